"""What a function's statements read, write and still need: by name, erring on the safe side."""

from __future__ import annotations

import ast
from collections.abc import Iterator

SCOPES = ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef
METADATA = {"shape", "dtype", "device", "ndim"}
# Calls that write nothing: views, questions, and functions that only compute.
_PURE_WORDS = (
    "chunk split unbind view reshape unsqueeze squeeze to type type_as size dim numel permute "
    "transpose flatten expand expand_as float half double bool contiguous isinstance len "
    "getattr hasattr range int min max is_tensor items values append_dims rearrange cat stack "
    "add mul addcmul sigmoid silu group_norm"
)
_PURE = {*_PURE_WORDS.split()}


def names_in(node: ast.AST, owner: str | None) -> set[str]:
    """Names read in a node, but for `owner` and those whose shape or dtype alone is read."""
    metadata = {
        id(n.value) for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr in METADATA
    }
    return {
        n.id
        for n in ast.walk(node)
        if isinstance(n, ast.Name)
        and isinstance(n.ctx, ast.Load)
        and n.id != owner
        and id(n) not in metadata
    }


def assigned_name(s: ast.AST) -> str | None:
    """v, for v = ..., v: T = ... and v += ..."""
    if isinstance(s, ast.Assign) and len(s.targets) == 1:
        return getattr(s.targets[0], "id", None)
    if isinstance(s, (ast.AnnAssign, ast.AugAssign)):
        return getattr(s.target, "id", None)
    return None


class Aliases:
    """Names that may stand for the same memory anywhere in a function.

    A call may return what it is given, and keep it; arithmetic makes a new tensor.
    """

    def __init__(self, definition: ast.FunctionDef, owner: str) -> None:
        self._group: dict[str, set[str]] = {}
        for node in ast.walk(definition):
            if isinstance(node, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
                targets = getattr(node, "targets", None) or [node.target]
                stored = {
                    n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)
                }  # fmt: skip
                fresh = isinstance(node.value, (ast.BinOp, ast.Constant))
                self._join((stored - {owner}) | (set() if fresh else names_in(node, owner)))
            elif isinstance(node, ast.For):
                stored = {n.id for n in ast.walk(node.target) if isinstance(n, ast.Name)}
                self._join(stored | names_in(node.iter, owner))
            elif isinstance(node, ast.Call) and _may_write(node):
                self._join(_given(node, owner))

    def _join(self, names: set[str]) -> None:
        together = set(names).union(*(self._group.get(n, set()) for n in names))
        for name in together:
            self._group[name] = together

    def of(self, names: set[str]) -> set[str]:
        return set(names).union(*(self._group.get(n, set()) for n in names))


def _given(call: ast.Call, owner: str) -> set[str]:
    """Names of what a call gets: the receiver of a method and the arguments; not of new tensors."""
    given = [*call.args, *(k.value for k in call.keywords)]
    if isinstance(call.func, ast.Attribute):
        given.append(call.func)
    return {
        name
        for e in given
        if not isinstance(e, (ast.BinOp, ast.UnaryOp, ast.Constant))
        for name in names_in(e, owner)
    }


def _may_write(call: ast.Call) -> bool:
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    return name not in _PURE or any(k.arg in ("inplace", "out") for k in call.keywords)


def writers(node: ast.AST, owner: str) -> Iterator[tuple[ast.AST, set[str] | None]]:
    """What may write, in a statement or expression, and the names it can reach; None for all.

    A call reaches what it is given: the receiver of a method and the arguments.
    """
    for n in ast.walk(node):
        if isinstance(n, ast.Call) and _may_write(n):
            yield n, None if _reaches_all(n, owner) else _given(n, owner)
        elif isinstance(n, ast.AugAssign):
            yield n, _stored(n.target, owner)
        elif isinstance(n, (ast.Subscript, ast.Attribute)) and not isinstance(n.ctx, ast.Load):
            keeps = isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == owner
            if not keeps:  # self.last = h writes no tensor
                yield n, _stored(n, owner)


def _stored(target: ast.expr, owner: str) -> set[str] | None:
    names = {m.id for m in ast.walk(target) if isinstance(m, ast.Name)}
    return None if owner in names else names


def _reaches_all(call: ast.Call, owner: str) -> bool:
    """self.kept.mul_(2), whatever was kept; and what changes how everything is computed."""
    f = call.func
    name = getattr(f, "attr", getattr(f, "id", ""))
    if name in ("set_grad_enabled", "set_autocast_enabled"):
        return True
    in_place = name.endswith("_") and not name.endswith("__")
    return in_place and any(isinstance(n, ast.Name) and n.id == owner for n in ast.walk(f))


def _reads(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def live_before(block: list[ast.stmt], after: set[str], everything: set[str]) -> set[str]:
    """Names whose values are read in the block, or behind it, before they are assigned anew."""
    for s in reversed(block):
        after = _live_before(s, after, everything)
    return after


def _live_before(s: ast.stmt, after: set[str], everything: set[str]) -> set[str]:
    if isinstance(s, (ast.Return, ast.Raise)):
        return _reads(s)
    if isinstance(s, (ast.Break, ast.Continue)):
        return everything
    if isinstance(s, ast.If):
        branches = (live_before(b, after, everything) for b in (s.body, s.orelse))
        return _reads(s.test).union(*branches)
    if isinstance(s, ast.With):
        heads = (_reads(i.context_expr) for i in s.items)
        return live_before(s.body, after, everything).union(*heads)
    if isinstance(s, (ast.For, ast.While)):
        head = _reads(s.iter if isinstance(s, ast.For) else s.test)
        live = after | head
        for _ in range(2):  # the body follows itself
            live = live | live_before(s.body, live, everything)
        return live | live_before(s.orelse, after, everything)
    if isinstance(s, (ast.Try, ast.Match, getattr(ast, "TryStar", ast.Try), *SCOPES)):
        return after | _reads(s)
    name = assigned_name(s)
    reads = _reads(s)
    if isinstance(s, ast.AugAssign):
        return after | reads | {name or ""}
    targets = getattr(s, "targets", [])
    stored = {t.id for t in targets if isinstance(t, ast.Name)} | ({name} if name else set())
    for t in targets:
        if isinstance(t, ast.Tuple):
            stored |= {e.id for e in t.elts if isinstance(e, ast.Name)}
    return (after - stored) | reads
