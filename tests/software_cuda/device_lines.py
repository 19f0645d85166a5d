"""Which lines of a Python file run only where there is a CUDA or Triton device.

Found in the source, so that a line that no test reaches is found too: conditions are evaluated as
on a machine without a device (`device.type == "cuda"` and `x.is_cuda` are false there, the rest is
unknown), and what they leave out is such a line. So are calls of torch.cuda, and the bodies of
functions that are named for a device and of private ones that only such lines mention. Bodies of
Triton kernels are left out: they are compiled, not run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

# Files whose functions are for devices, whatever their names.
WHOLE_FILES = ("triton_kernels/", "fastdiff/_gpus.py", "fastdiff/samplers/cuda_graph.py")
_NAMED_FOR_A_DEVICE = re.compile(r"(^|_)(cuda|gpus?|triton)(_|$)")
_FALSE_WITHOUT = re.compile(r"torch\.cuda\.is_available\(\)|_is_cuda\(\w+\)|.*\.is_cuda")
_NONE_WITHOUT = re.compile(r"torch\.version\.(cuda|hip)")
_TYPE_OF_A_DEVICE = re.compile(r".*\.type")
_WORKS_WITHOUT = ("is_available", "device_count", "is_current_stream_capturing")
_ENDINGS = (ast.Return, ast.Raise, ast.Continue, ast.Break)
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def without_a_device(test: ast.expr) -> bool | None:
    """What a condition is on a machine without a device; None: it depends."""
    text = ast.unparse(test)
    if _FALSE_WITHOUT.fullmatch(text):
        return False
    if text.endswith(".is_cpu"):
        return True
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        value = without_a_device(test.operand)
        return None if value is None else not value
    if isinstance(test, ast.BoolOp):
        values = [without_a_device(value) for value in test.values]
        decides = isinstance(test.op, ast.Or)
        if {True, False} <= set(values):  # a device that was asked for, and is not there
            return None
        if decides in values:
            return decides
        return None if None in values else not decides
    if isinstance(test, ast.IfExp):
        chosen = without_a_device(test.test)
        ways = {True: [test.body], False: [test.orelse], None: [test.body, test.orelse]}[chosen]
        values = {without_a_device(way) for way in ways}
        return values.pop() if len(values) == 1 else None
    if isinstance(test, ast.Compare) and len(test.ops) == 1:
        left, right = ast.unparse(test.left), ast.unparse(test.comparators[0])
        equal = isinstance(test.ops[0], (ast.Eq, ast.Is))
        if not equal and not isinstance(test.ops[0], (ast.NotEq, ast.IsNot)):
            return None
        if _TYPE_OF_A_DEVICE.fullmatch(left) and right in ("'cuda'", "'cpu'"):
            return equal == (right == "'cpu'")
        if _NONE_WITHOUT.fullmatch(left) and right == "None":
            return None if left.endswith("cuda") else equal
    return None


class _Marks:
    """Statements of one file that need a device, grown until nothing more is found."""

    def __init__(self, tree: ast.Module, whole: bool) -> None:
        self.tree = tree
        self.statements: set[ast.stmt] = set()
        self.functions = {f for f in ast.walk(tree) if isinstance(f, _Function)}
        self.of_a_device = {
            f for f in self.functions if whole or _NAMED_FOR_A_DEVICE.search(f.name)
        }
        while True:
            self.statements.clear()
            self._block(tree.body, False)
            found = {f for f in self.functions - self.of_a_device if self._only_for_a_device(f)}
            if not found:
                break
            self.of_a_device |= found

    def _block(self, block: list[ast.stmt], marked: bool) -> None:
        for statement in block:
            self._statement(statement, marked)
            if isinstance(statement, ast.If) and _ends(statement.body):
                # What follows `if device.type != "cuda": return`.
                marked = marked or without_a_device(statement.test) is True

    def _statement(self, statement: ast.stmt, marked: bool) -> None:
        if marked or _asks_a_device(statement):
            self.statements.add(statement)
        if isinstance(statement, _Function):
            if not _is_compiled(statement):
                self._block(statement.body, marked or statement in self.of_a_device)
        elif isinstance(statement, ast.If):
            value = without_a_device(statement.test)
            # Of the two ways that one is left which a machine without a device does not take.
            self._block(statement.body, value is False or (marked and value is None))
            self._block(statement.orelse, value is True or (marked and value is None))
        else:
            for _, child in ast.iter_fields(statement):
                if not isinstance(child, list) or not child:
                    continue
                if isinstance(child[0], ast.stmt):
                    self._block(child, marked)
                for part in child:
                    if isinstance(part, (ast.ExceptHandler, ast.match_case)):
                        self._block(part.body, marked)

    def _only_for_a_device(self, function: _Function) -> bool:
        if not function.name.startswith("_") or function.name.startswith("__"):
            return False
        mentions = [
            statement in self.statements
            for statement in ast.walk(self.tree)
            if isinstance(statement, ast.stmt)
            and any(function.name in (_name(part), _attribute(part)) for part in _own(statement))
        ]
        return bool(mentions) and all(mentions)


def _ends(block: list[ast.stmt]) -> bool:
    return isinstance(block[-1], _ENDINGS)


def _is_compiled(function: _Function) -> bool:
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def _own(statement: ast.stmt, *without: type[ast.AST]) -> Iterator[ast.AST]:
    """The expressions of a statement, but for those of statements inside, and what is in them."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        for child in ast.iter_child_nodes(waiting.pop()):
            if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case, *without)):
                yield child
                waiting.append(child)


def _name(node: ast.AST) -> str | None:
    return node.id if isinstance(node, ast.Name) else None


def _attribute(node: ast.AST) -> str | None:
    return node.attr if isinstance(node, ast.Attribute) else None


def _asks_a_device(statement: ast.stmt) -> bool:
    """Calls what of torch.cuda fails without a device, in every case."""
    return any(
        isinstance(node, ast.Call)
        and (name := ast.unparse(node.func)).startswith("torch.cuda.")
        and name.removeprefix("torch.cuda.") not in _WORKS_WITHOUT
        for node in _own(statement, ast.IfExp, ast.BoolOp)
    )


def device_lines(file: str, source: str) -> set[int]:
    """First lines of the statements that run only where there is a device.

    `file` is the path inside the project.
    """
    marks = _Marks(ast.parse(source), file.startswith(WHOLE_FILES))
    return {statement.lineno for statement in marks.statements}
