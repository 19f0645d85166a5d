"""An owner's methods, with `act(norm(x))` in them as one call.

The source of a method is rewritten at these expressions and nowhere else:

    self.act(self.norm(x))                              -> pair(self, "norm", "act", x)
    v = self.norm(x)  followed by  v = self.act(v)      -> v = pair(self, "norm", "act", x)

(also `return self.act(v)`, and norms at the end of the branches of an `if`, as in diffusers'
Decoder). `pair` decides on the modules that are there when it runs. So both modules stay what they
are for everybody else who calls them: a hook, a feature extractor, another forward.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
import inspect
import linecache
import textwrap
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType

_FUTURES = sum(getattr(__future__, name).compiler_flag for name in __future__.all_feature_names)

Pairs = frozenset[tuple[str, str]]
"""Names of attributes: (norm, activation)."""


def methods_of(cls: type) -> dict[str, FunctionType]:
    """The methods that an instance runs, by name; those of torch's own classes left out."""
    found: dict[str, object] = {}
    for c in cls.__mro__:
        for name, value in vars(c).items():
            found.setdefault(name, None if c.__module__.startswith("torch.") else value)
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, FunctionType) and not name.startswith("__")
    }


@functools.cache
def pairs_in(function: FunctionType, pairs: Pairs) -> Pairs:
    """Those of the pairs that the function calls in one of the forms."""
    definition = _definition(_innermost(function))
    if definition is None:
        return frozenset()
    rewrite = _Rewrite(definition, pairs)
    rewrite.run()
    return frozenset(rewrite.found)


@functools.cache
def rewritten(function: FunctionType, pairs: Pairs, pair: Callable) -> FunctionType:
    """The function with its calls of these pairs replaced by calls of `pair`.

    Under decorators the innermost function is rewritten, and the decorators are put around it
    again with the same closures.
    """
    inner = function.__dict__.get("__wrapped__")
    if inner is None:
        return _compiled(function, pairs, pair)
    new = rewritten(inner, pairs, pair)
    cells = tuple(CellType(new) if _holds(c, inner) else c for c in function.__closure__)
    around = _like(function, function.__code__, cells)
    around.__wrapped__ = new
    return around


def _like(function: FunctionType, code: CodeType, closure: tuple) -> FunctionType:
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure or None
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(made, function)


def _holds(cell: CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False


def _innermost(function: FunctionType) -> FunctionType | None:
    """Below decorators, each of which must keep the function below it in its closure."""
    while (inner := function.__dict__.get("__wrapped__")) is not None:
        cells = function.__closure__ or ()
        if not isinstance(inner, FunctionType) or sum(_holds(c, inner) for c in cells) != 1:
            return None
        if "_torchdynamo_orig_callable" in function.__dict__:  # torch.compile's keeps it elsewhere
            return None
        function = inner
    return function


@functools.cache
def _definition(function: FunctionType | None) -> ast.FunctionDef | None:
    """What the function was made of; None unless that is certain."""
    if function is None:
        return None
    code = function.__code__
    try:
        lines, first = inspect.getsourcelines(code)
        source = "".join(linecache.getlines(code.co_filename))
        if _codes(source, code.co_filename).get((code.co_name, code.co_firstlineno)) != code:
            return None  # the file has changed since, or the function was made otherwise
        definition = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError):  # no source: made at run time
        return None
    if not isinstance(definition, ast.FunctionDef) or not definition.args.args:
        return None
    owner, nodes = definition.args.args[0].arg, list(ast.walk(definition))
    stored = (n.id for n in nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load))
    if owner in stored or getattr(definition, "type_params", None):
        return None
    if any(_is_mangled(name) for n in nodes for name in _identifiers(n)):
        return None  # in a class these have other names
    return ast.increment_lineno(definition, first - 1)


def _identifiers(node: ast.AST) -> Iterator[str]:
    if not isinstance(node, ast.Constant):
        for _, value in ast.iter_fields(node):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, str):
                    yield one


def _is_mangled(name: str) -> bool:
    return name.startswith("__") and not name.endswith("__")


@functools.lru_cache(maxsize=8)
def _codes(source: str, filename: str) -> dict[tuple[str, int], CodeType]:
    """Every code object that the source gives, by name and first line."""
    found, todo = {}, [compile(source, filename, "exec", dont_inherit=True)]
    while todo:
        code = todo.pop()
        found[code.co_name, code.co_firstlineno] = code
        todo += [c for c in code.co_consts if isinstance(c, CodeType)]
    return found


def _compiled(function: FunctionType, pairs: Pairs, pair: Callable) -> FunctionType:
    body = _Rewrite(_definition(function), pairs).run()
    # The signature is kept from `function`; what is evaluated where a def stands is left out.
    body.decorator_list, body.returns = [], None
    body.args.defaults = [ast.Constant(None) for _ in body.args.defaults]
    body.args.kw_defaults = [d and ast.Constant(None) for d in body.args.kw_defaults]
    for argument in ast.walk(body.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    # In a factory whose parameters are its closure, `__class__` for super() among them.
    names = sorted({_PAIR, *function.__code__.co_freevars})
    parameters = ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])
    factory = ast.parse("def factory(): pass").body[0]
    factory.args, factory.body = parameters, [body, ast.Return(ast.Name(body.name, ast.Load()))]
    module = ast.fix_missing_locations(ast.Module([factory], []))
    flags = function.__code__.co_flags & _FUTURES
    namespace: dict = {}
    code = compile(module, function.__code__.co_filename, "exec", flags, dont_inherit=True)
    exec(code, function.__globals__, namespace)
    made = namespace["factory"](**dict.fromkeys(names))
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells[_PAIR] = CellType(pair)
    return _like(function, made.__code__, tuple(cells[name] for name in made.__code__.co_freevars))


_PAIR = "_fastdiff_pair"


class _Rewrite(ast.NodeTransformer):
    """Replaces the calls of `pairs`; `found` has which there were."""

    def __init__(self, definition: ast.FunctionDef, pairs: Pairs) -> None:
        self.definition, self.pairs = copy.deepcopy(definition), pairs
        definition = self.definition
        self.owner = definition.args.args[0].arg
        self.found: set[tuple[str, str]] = set()
        nodes = list(ast.walk(definition))
        # Variables that may be read elsewhere than where they seem to be.
        inner = [n for n in nodes if isinstance(n, _SCOPES) and n is not definition]
        self.escaping = {n.id for f in inner for n in ast.walk(f) if isinstance(n, ast.Name)}
        for n in nodes:
            if isinstance(n, (ast.Global, ast.Nonlocal)):
                self.escaping.update(n.names)
        self.nothing_after_return = not any(isinstance(n, _HANDLERS) for n in nodes)

    def run(self) -> ast.FunctionDef:
        return self.visit(self.definition)

    def visit(self, node: ast.AST) -> ast.AST:
        if isinstance(node, _SCOPES) and node is not self.definition:
            return node
        if isinstance(node, ast.Call):
            inner = node.args[0] if self._attribute_called(node) else None
            node = self._pair(node, inner) or node
        for field in ("body", "orelse", "finalbody"):
            if isinstance(block := getattr(node, field, None), list):
                setattr(node, field, self._merged(block))
        return self.generic_visit(node)

    def _attribute_called(self, node: ast.AST | None) -> str | None:
        """The name in `self.name(x)`, x being the only argument."""
        if not isinstance(node, ast.Call) or node.keywords or len(node.args) != 1:
            return None
        f = node.func
        if not isinstance(f, ast.Attribute) or isinstance(node.args[0], ast.Starred):
            return None
        return f.attr if isinstance(f.value, ast.Name) and f.value.id == self.owner else None

    def _pair(self, outer: ast.Call, inner: ast.AST | None) -> ast.Call | None:
        """pair(...) in place of self.act(...) and self.norm(x), if these are to be replaced."""
        names = self._attribute_called(inner), self._attribute_called(outer)
        if names not in self.pairs:
            return None
        self.found.add(names)
        arguments = [ast.Name(self.owner, ast.Load()), *map(ast.Constant, names), inner.args[0]]
        call = ast.Call(ast.Name(_PAIR, ast.Load()), arguments, [])
        return ast.fix_missing_locations(ast.copy_location(call, inner))

    def _merged(self, block: list[ast.stmt]) -> list[ast.stmt]:
        """The block with two statements that make a pair as one."""
        done: list[ast.stmt] = []
        for statement in block:
            merged = self._merge(done[-1], statement) if done and self._reads(statement) else None
            if merged is None:
                done.append(statement)
            else:
                done[-1] = merged
        return done

    def _reads(self, statement: ast.stmt) -> str | None:
        """v, for `v = self.name(v)` and `return self.name(v)`: its value is not read again."""
        call = getattr(statement, "value", None)
        if self._attribute_called(call) is None or not isinstance(call.args[0], ast.Name):
            return None
        name = call.args[0].id
        ends = isinstance(statement, ast.Return) and self.nothing_after_return
        return name if (ends or _target(statement) == name) and name not in self.escaping else None

    def _merge(self, first: ast.stmt, second: ast.stmt) -> ast.stmt | None:
        """One statement for both, if `first` is, or ends in, v = self.norm(x)."""
        if isinstance(first, ast.If):
            ends = [
                self._merge(block[-1], second) if block else None
                for block in (first.body, first.orelse)
            ]
            if ends == [None, None]:
                return None
            for block, end in zip((first.body, first.orelse), ends, strict=True):
                if end is not None:
                    block[-1] = end
                elif not block or not isinstance(block[-1], _LEAVES):
                    block.append(copy.deepcopy(second))
            return first
        if _target(first) != self._reads(second):
            return None
        call = self._pair(second.value, first.value)
        if call is None:
            return None
        merged = copy.copy(second)
        merged.value = call
        return ast.copy_location(merged, first)


_SCOPES = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef
_HANDLERS = ast.Try, getattr(ast, "TryStar", ast.Try), ast.With
_LEAVES = ast.Return, ast.Raise, ast.Continue, ast.Break


def _target(statement: ast.stmt) -> str | None:
    """v, for `v = ...`."""
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        return getattr(statement.targets[0], "id", None)
    return None
