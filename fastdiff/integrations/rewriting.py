"""A method of a normalization's owner, with the expressions that fuse as calls of `deferred`.

    self.norm(x)                      normalization: its value may be deferred
    h + t, h += t, h.add_(t)          in front of one
    n * (1 + s), n + u, addcmul       behind one
    f(n), n * sigmoid(n)              what may be SiLU

These are replaced, and nothing else: everything around them stays the author's Python. A variable
that may hold a deferred value is finished wherever anything else reads it, and before a statement
that could write in the memory it stands for while it is still needed (`_flow`).
"""

from __future__ import annotations

import ast
import copy
import functools
from dataclasses import dataclass, field
from types import FunctionType

from fastdiff.integrations import deferred
from fastdiff.integrations._flow import (
    SCOPES,
    Aliases,
    assigned_name,
    live_before,
    names_in,
    writers,
)
from fastdiff.integrations.sources import definition_of, recompiled

_HELPERS = {
    f"_fastdiff_{name}": getattr(deferred, name)
    for name in (
        "add", "add_in_place", "addcmul", "apply", "call", "cast", "early", "group_norm", "like", "now",
        "scaled", "scaled_sum", "settle", "swish", "UNASSIGNED",
    )
}  # fmt: skip
_TRIES = ast.Try, ast.Match, getattr(ast, "TryStar", ast.Try)
_COMPOUND = ast.If, ast.For, ast.While, ast.With, *_TRIES
_METADATA = {"shape", "dtype", "device", "ndim"}
_FORBIDDEN = (ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)
_REFLECTION = {"locals", "vars", "eval", "exec", "globals"}


@dataclass
class Site:
    """A call of a normalization, and what the source shows around it."""

    callee: ast.expr
    is_functional: bool
    has_sum: bool = False
    has_scale_shift: bool = False
    conditions: tuple[tuple[ast.expr, bool], ...] = ()
    """Tests of the branches around it, and their outcome."""
    activations: list[ast.expr | None] = field(default_factory=list)
    """What is called with its value; None for a product with its sigmoid."""


@dataclass
class _Pending:
    """A variable that may hold a Deferred here."""

    reached: set[str]
    """Names through which the memory can be written that it stands for."""
    sites: set[int]
    """Of which normalizations, by id of the call; none for a sum."""


@dataclass(frozen=True)
class Rewritten:
    function: FunctionType | None
    """None: nothing fuses, or `reason`."""
    sites: tuple[Site, ...] = ()
    owner: str = "self"
    locals: dict[str, ast.expr] = field(default_factory=dict)
    """Local names for parts of the owner."""
    reason: str | None = None
    """Why the source could not be rewritten."""


@functools.cache
def rewritten(function: FunctionType, norms: frozenset[str]) -> Rewritten:
    """`function` rewritten, for an owner with normalizations in these attributes."""
    definition = definition_of(function)
    if isinstance(definition, str):
        return Rewritten(None, reason=definition)
    nodes = list(ast.walk(definition))
    if any(isinstance(n, _FORBIDDEN) for n in nodes):
        return Rewritten(None, reason="it is a generator, or writes global names")
    if any(isinstance(n, ast.Name) and n.id in _REFLECTION for n in nodes):
        return Rewritten(None, reason="it looks at its own variables")
    rewriter = _Rewriter(definition, norms)
    if not rewriter.sites:
        return Rewritten(None)
    body = rewriter.run()
    made = recompiled(function, body, _HELPERS) if rewriter.fuses else None
    return Rewritten(made, tuple(rewriter.sites.values()), rewriter.owner, rewriter.locals)


def _sole_argument(e: ast.AST) -> ast.expr | None:
    """x in f(x) and f(x, inplace=...)."""
    if not isinstance(e, ast.Call) or len(e.args) != 1 or isinstance(e.args[0], ast.Starred):
        return None
    return e.args[0] if all(k.arg == "inplace" for k in e.keywords) else None


def _function_name(e: ast.AST) -> str | None:
    """The last name of a call without keywords: "add" of torch.add(...) and h.add(...)."""
    if not isinstance(e, ast.Call) or e.keywords:
        return None
    return getattr(e.func, "attr", getattr(e.func, "id", None))


def _is_torch(e: ast.expr) -> bool:
    return isinstance(e, ast.Name) and e.id in ("torch", "th")


def _binary(e: ast.AST) -> tuple[str, ast.expr, ast.expr] | None:
    """("add" or "mul", a, b) of a + b, torch.add(a, b), a.add(b), and the same for products."""
    if isinstance(e, ast.BinOp) and isinstance(e.op, (ast.Add, ast.Mult)):
        return ("add" if isinstance(e.op, ast.Add) else "mul"), e.left, e.right
    name = _function_name(e)
    if name not in ("add", "mul") or not isinstance(e.func, ast.Attribute):
        return None
    operands = e.args if _is_torch(e.func.value) else [e.func.value, *e.args]
    return (name, *operands) if len(operands) == 2 else None


def _one_plus(e: ast.expr) -> ast.expr | None:
    """s of 1 + s."""
    kind, a, b = _binary(e) or ("", e, e)
    for one, s in ((a, b), (b, a)):
        if kind == "add" and isinstance(one, ast.Constant) and one.value in (1, 1.0):
            return s
    return None


def _cast(e: ast.AST) -> ast.expr | None:
    """h of h.float(), h.type(dtype) and h.to(dtype)."""
    if _function_name(e) not in ("float", "type", "to") or len(e.args) > 1:
        return None
    return e.func.value if isinstance(e.func, ast.Attribute) else None


def _is_name(e: ast.AST, name: str | None = None) -> bool:
    return isinstance(e, ast.Name) and (name is None or e.id == name)


def _swish(e: ast.AST) -> tuple[str, ast.expr] | None:
    """(v, f) of v * f(v), with an f called sigmoid."""
    kind, a, b = _binary(e) or ("", e, e)
    for v, gate in ((a, b), (b, a)):
        if kind == "mul" and _is_name(v) and _function_name(gate) == "sigmoid":
            if len(gate.args) == 1 and _is_name(gate.args[0], v.id):
                return v.id, gate.func
            if not gate.args and _is_name(gate.func.value, v.id):  # v.sigmoid()
                return v.id, ast.Attribute(ast.Name("torch", ast.Load()), "sigmoid", ast.Load())
    return None


class _Rewriter(ast.NodeTransformer):
    def __init__(self, definition: ast.FunctionDef, norms: frozenset[str]) -> None:
        self.definition, self.norms = _augmented(definition), norms
        self.owner = definition.args.args[0].arg
        self.conditions: tuple[tuple[ast.expr, bool], ...] = ()
        self.fuses = 0
        nodes = list(ast.walk(definition))
        inner = [n for n in nodes if isinstance(n, SCOPES) and n is not definition]
        # Variables that may be read elsewhere than where they seem to be.
        self.escaping = {n.id for f in inner for n in ast.walk(f) if isinstance(n, ast.Name)}
        self.escaping |= {
            n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Del)
        }
        self.locals = self._locals(nodes)
        calls = [n for n in nodes if self._is_norm_call(n)]
        self.sites = {
            id(call): Site(copy.deepcopy(call.func), self._is_functional(call)) for call in calls
        }
        read = [_cast(call.args[0]) or call.args[0] for call in calls]
        self.read_by_norms = {e.id for e in read if _is_name(e)}
        self.variables = self._variables(nodes)
        self.aliases = Aliases(definition, self.owner)

    # What the function holds.

    def _locals(self, nodes: list[ast.AST]) -> dict[str, ast.expr]:
        """Local names that may stand for a normalization, and where they come from."""
        found: dict[str, ast.expr] = {}
        for _ in range(3):  # names of names
            for node in nodes:
                if isinstance(node, ast.Assign) and len(node.targets) == 1:
                    target, value = node.targets[0], node.value
                    both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
                    pairs = (
                        zip(target.elts, value.elts, strict=False) if both else [(target, value)]
                    )
                elif isinstance(node, (ast.For, ast.comprehension)):
                    pairs = [(node.target, node.iter)]
                else:
                    continue
                for target, value in pairs:
                    if self._is_part(value, found):
                        for name in ast.walk(target):
                            if isinstance(name, ast.Name):
                                found[name.id] = value
        return found

    def _is_part(self, e: ast.expr, known: dict[str, ast.expr]) -> bool:
        """Whether e is a part of the owner that holds normalizations, or a name for one."""
        while True:
            if isinstance(e, ast.Call) and (
                getattr(e.func, "attr", "") in ("items", "values", "children")
                or getattr(e.func, "id", "") in ("iter", "list", "enumerate", "reversed", "zip")
            ):
                return any(self._is_part(a, known) for a in (e.func, *e.args))
            if isinstance(e, ast.Name):
                return e.id in known
            if isinstance(e, ast.Attribute) and _is_name(e.value, self.owner):
                return e.attr in self.norms
            if not isinstance(e, (ast.Attribute, ast.Subscript)):
                return False
            e = e.value

    def _is_norm_call(self, e: ast.AST) -> bool:
        if self._is_functional(e):
            return True
        x = _sole_argument(e)
        return x is not None and not e.keywords and self._is_part(e.func, self.locals)

    def _is_functional(self, e: ast.AST) -> bool:
        """F.group_norm(x, ...)."""
        if not isinstance(e, ast.Call) or not e.args or isinstance(e.args[0], ast.Starred):
            return False
        f = e.func
        if isinstance(f, ast.Attribute):
            return f.attr == "group_norm" and not _is_name(f.value, self.owner)
        return _is_name(f, "group_norm")

    def _variables(self, nodes: list[ast.AST]) -> set[str]:
        """All that may hold a Deferred anywhere, found until there are no more."""
        self.pending = dict.fromkeys(self.read_by_norms)  # as sums
        while True:
            before = len(self.pending)
            for node in nodes:
                name = assigned_name(node)
                if name is not None and not isinstance(node, ast.AugAssign):
                    if self._may_defer(node.value):
                        self.pending[name] = None
            if before == len(self.pending):
                return self.pending.keys() - self.escaping

    def _may_defer(self, e: ast.AST | None, early: bool = False) -> bool:
        """`early`: a normalization reads the value."""
        if isinstance(e, ast.Name):
            return e.id in self.pending
        if isinstance(e, ast.IfExp):
            return self._may_defer(e.body) or self._may_defer(e.orelse)
        if self._is_norm_call(e) or self._addcmul(e) or self._scaled_sum(e):
            return True
        if (image := _cast(e)) is not None:
            return self._may_defer(image)
        kind, a, b = _binary(e) or ("", e, e)
        if kind == "add":
            return early or self._open(a, b) or self._open(b, a)
        if kind == "mul":
            return any(self._open(x, s) and _one_plus(s) for x, s in ((a, b), (b, a)))
        return False

    def _open(self, image: ast.expr, other: ast.expr) -> bool:
        """Whether image may be deferred until `other`, beside it, was evaluated."""
        if not self._may_defer(image):
            return False
        reached = names_in(image, self.owner)
        return not any(names is None or reached & names for _, names in writers(other, self.owner))

    def _addcmul(self, e: ast.AST | None) -> bool:
        if _function_name(e) != "addcmul" or len(e.args) != 3:
            return False
        return self._open(e.args[1], e.args[2]) and _one_plus(e.args[2]) is not None

    def _scaled_sum(self, e: ast.AST | None) -> tuple[str, ast.expr] | None:
        """(g, s) of g + g * s."""
        kind, a, b = _binary(e) or ("", e, e)
        for g, product in ((a, b), (b, a)):
            factor, c, d = _binary(product) or ("", e, e)
            if kind == "add" and factor == "mul" and _is_name(g) and g.id in self.pending:
                for same, s in ((c, d), (d, c)):
                    if _is_name(same, g.id):
                        return g.id, s
        return None

    def _sites_of(self, e: ast.AST | None) -> set[int]:
        if isinstance(e, ast.Name):
            return self.pending[e.id].sites if e.id in self.pending else set()
        if self._is_norm_call(e):
            return {id(e)}
        if isinstance(e, ast.IfExp):
            return self._sites_of(e.body) | self._sites_of(e.orelse)
        if self._addcmul(e):
            return self._sites_of(e.args[1])
        if e is not None and (image := _cast(e)) is not None:
            return self._sites_of(image)
        _, a, b = _binary(e) or ("", None, None)
        return self._sites_of(a) | self._sites_of(b) if a is not None else set()

    # Expressions.

    def _helper(self, name: str, *args: ast.expr) -> ast.Call:
        return ast.Call(ast.Name(f"_fastdiff_{name}", ast.Load()), list(args), [])

    def _fuse(self, name: str, *args: ast.expr) -> ast.Call:
        self.fuses += 1
        return self._helper(name, *args)

    def visit(self, node: ast.AST) -> ast.AST:
        """Statements by their methods, expressions as values."""
        if isinstance(node, ast.Name):
            is_read = isinstance(node.ctx, ast.Load) and node.id in self.pending
            return self._helper("now", node) if is_read else node
        if isinstance(node, SCOPES):
            return node
        if not isinstance(node, ast.expr):
            return super().visit(node)
        if (found := _swish(node)) and found[0] in self.pending:
            self._note(ast.Name(found[0], ast.Load()), None)
            return self._at(node, self._fuse("swish", ast.Name(found[0], ast.Load()), found[1]))
        if self._may_defer(node):
            return self._at(node, self._helper("now", self._deferred(node)))
        argument = _sole_argument(node)
        if argument is not None and self._may_defer(argument):
            self._note(argument, node.func)
            made = self._fuse("apply", self.visit(node.func), self._deferred(argument))
            made.keywords = node.keywords
            return self._at(node, made)
        if self._reads_metadata(node):
            owner = node.func if isinstance(node, ast.Call) else node
            owner.value = self._helper("like", owner.value)
            return node
        return self.generic_visit(node)

    def _reads_metadata(self, e: ast.expr) -> bool:
        if isinstance(e, ast.Call) and isinstance(e.func, ast.Attribute):
            value = e.func.value if e.func.attr in ("size", "dim") else None
        else:
            value = e.value if isinstance(e, ast.Attribute) and e.attr in _METADATA else None
        return _is_name(value) and value.id in self.pending

    def _note(self, e: ast.expr, activation: ast.expr | None) -> None:
        for site in self._sites_of(e):
            self.sites[site].activations.append(copy.deepcopy(activation))

    @staticmethod
    def _at(old: ast.expr, new: ast.expr) -> ast.expr:
        return ast.fix_missing_locations(ast.copy_location(new, old))

    def _deferred(self, e: ast.expr, early: bool = False) -> ast.expr:
        """e, where a Deferred is welcome."""
        return self._at(e, self._replaced(e, early))

    def _replaced(self, e: ast.expr, early: bool) -> ast.expr:
        if isinstance(e, ast.Name) and e.id in self.pending:
            return e
        if not self._may_defer(e, early):
            return self.visit(e)
        if isinstance(e, ast.IfExp):
            return ast.IfExp(self.visit(e.test), *map(self._deferred, (e.body, e.orelse)))
        if self._is_norm_call(e):
            return self._norm_call(e)
        if self._addcmul(e):
            self._mark_scaled(e)
            shift, image, factor = e.args
            return self._fuse(
                "addcmul", self.visit(e.func), self.visit(shift), self._deferred(image),
                self.visit(_one_plus(factor)),
            )  # fmt: skip
        if found := self._scaled_sum(e):
            self._mark_scaled(e)
            return self._fuse("scaled_sum", ast.Name(found[0], ast.Load()), self.visit(found[1]))
        if (image := _cast(e)) is not None:
            name = ast.Constant(e.func.attr)
            return self._helper("cast", self._deferred(image), name, *map(self.visit, e.args))
        kind, a, b = _binary(e)
        if kind == "mul":
            self._mark_scaled(e)
            image, factor = (a, b) if self._open(a, b) and _one_plus(b) else (b, a)
            return self._fuse("scaled", self._deferred(image), self.visit(_one_plus(factor)))
        return self._fuse("early" if early else "add", self._deferred(a), self._deferred(b))

    def _mark_scaled(self, e: ast.expr) -> None:
        for site in self._sites_of(e):
            self.sites[site].has_scale_shift = True

    def _norm_call(self, e: ast.Call) -> ast.expr:
        x, *rest = e.args
        is_sum = (_binary(x) or ("",))[0] == "add"
        added = self._added_in_argument(x)
        inner = added or self._deferred(x, early=is_sum)
        site = self.sites[id(e)]
        site.has_sum = is_sum or bool(added) or (_is_name(x) and x.id in self.pending)
        site.conditions = self.conditions
        self._note(x, e.func)  # a Sequential that goes on where this one stopped
        if not self._is_functional(e):
            return self._helper("call", self.visit(e.func), inner)
        made = self._fuse("group_norm", e.func, inner, *map(self.visit, rest))
        made.keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in e.keywords]
        return made

    def _added_in_argument(self, x: ast.expr) -> ast.Call | None:
        """norm(h.add_(t)): as `h += t` in front of it, if h is not read again."""
        if _function_name(x) != "add_" or len(x.args) != 1 or not _is_name(x.func.value):
            return None
        name = x.func.value.id
        if name not in self.made or name in self.needed or self.loads.get(name, 0) > 1:
            return None
        return self._in_place(name, x.args[0], True)

    def _in_place(self, name: str, value: ast.expr, method: bool) -> ast.Call:
        target = ast.Name(name, ast.Load())
        maker = copy.deepcopy(self.made[name])
        return self._fuse("add_in_place", target, self.visit(value), maker, ast.Constant(method))

    # Statements.

    def run(self) -> ast.FunctionDef:
        body = self.definition.body
        self.everything = {n.id for n in ast.walk(self.definition) if isinstance(n, ast.Name)}
        self.in_try = False
        self.pending: dict[str, _Pending] = {}
        self.deferring: set[str] = set()
        self.made: dict[str, ast.expr] = {}
        self.needed: set[str] = set()
        done = self._block(body, set())
        parameters = {a.arg for a in ast.walk(self.definition.args) if isinstance(a, ast.arg)}
        unassigned = sorted(self.deferring - parameters)
        if unassigned and self.fuses:
            first = ast.Assign(
                [ast.Name(name, ast.Store()) for name in unassigned],
                ast.Name("_fastdiff_UNASSIGNED", ast.Load()),
            )
            done.insert(0, self._at(body[0], first))
        self.definition.body = done
        return self.definition

    def _block(self, block: list[ast.stmt], after: set[str]) -> list[ast.stmt]:
        done: list[ast.stmt] = []
        for i, statement in enumerate(block):
            leaves = isinstance(statement, (ast.Return, ast.Raise))
            if self.in_try:
                needed = self.everything
            else:
                needed = set() if leaves else live_before(block[i + 1 :], after, self.everything)
            done += self._statement(statement, needed)
        return done

    def _finish(self, names: set[str], at: ast.stmt) -> list[ast.stmt]:
        names = sorted(names & self.pending.keys())
        for name in names:
            del self.pending[name]
        return [
            self._at(at, ast.Assign(
                [ast.Name(name, ast.Store())], self._helper("settle", ast.Name(name, ast.Load()))
            ))
            for name in names
        ]  # fmt: skip

    def _statement(self, s: ast.stmt, needed: set[str]) -> list[ast.stmt]:
        if isinstance(s, _COMPOUND):
            return self._compound(s, needed)
        if isinstance(s, SCOPES):
            return [s]
        name = assigned_name(s)
        self.needed = needed - {name}
        before = self._finish(self._endangered([s]), s)
        held = names_in(s, self.owner)
        held |= set().union(*(p.reached for n, p in self.pending.items() if n in held), set())
        self.loads = _loads(s)
        sites = self._sites_of(getattr(s, "value", None))
        new = self._simple(s, name)
        for read in {n.id for n in ast.walk(s) if isinstance(n, ast.Name)} & self.made.keys():
            if not _only_metadata(s, read):
                del self.made[read]
        if name is not None:
            self.pending.pop(name, None)
            if self._is_deferred_here:
                self.pending[name] = _Pending(self.aliases.of(held | {name}), sites)
                self.deferring.add(name)
            if (maker := self._maker(s)) is not None:
                self.made[name] = maker
        return [*before, new]

    def _simple(self, s: ast.stmt, name: str | None) -> ast.stmt:
        self._is_deferred_here = False
        if isinstance(s, ast.AugAssign):
            if name in self.made and name in self.variables and isinstance(s.op, ast.Add):
                self._is_deferred_here = True
                method = getattr(s, "is_method", False)
                value = self._in_place(name, s.value, method)
                return self._at(s, ast.Assign([ast.Name(name, ast.Store())], value))
            s.value = self.visit(s.value)
            return _restored(s)
        if name is None or name not in self.variables or s.value is None:
            return self.generic_visit(s)
        early = name in self.read_by_norms
        self._is_deferred_here = self._may_defer(s.value, early)
        s.value = self._deferred(s.value, early)
        return s

    def _endangered(self, parts: list[ast.AST]) -> set[str]:
        """Pending variables to finish before these parts of a statement run."""
        loads = {}
        for part in parts:
            loads |= _loads(part)
        found = {n for n, count in loads.items() if count > 1 or n in self.needed}
        for part in parts:
            if isinstance(part, ast.AugAssign) and assigned_name(part) in self.pending:
                found.add(assigned_name(part))
            for node, names in writers(part, self.owner):
                inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                late = {n for n in self.pending if n in self.needed or n in loads.keys() - inside}
                for name in late:
                    reached = self.pending[name].reached
                    if names is None or reached & self.aliases.of(names):
                        found.add(name)
        return found

    def _maker(self, s: ast.stmt) -> ast.expr | None:
        """`self.conv` of h = self.conv(...)."""
        f = s.value.func if isinstance(s, ast.Assign) and isinstance(s.value, ast.Call) else None
        if isinstance(f, ast.Attribute) and _is_name(f.value, self.owner):
            return ast.Attribute(ast.Name(self.owner, ast.Load()), f.attr, ast.Load())
        argument = getattr(s, "value", None)
        if _function_name(argument) == "_fastdiff_apply":
            f = argument.args[0]
            if isinstance(f, ast.Attribute) and _is_name(f.value, self.owner):
                return ast.Attribute(ast.Name(self.owner, ast.Load()), f.attr, ast.Load())
        return None

    def _compound(self, s: ast.stmt, needed: set[str]) -> list[ast.stmt]:
        heads = [
            getattr(s, field)
            for field in ("test", "iter", "subject")
            if hasattr(s, field)
        ] + [i.context_expr for i in getattr(s, "items", [])]  # fmt: skip
        loops, tries = isinstance(s, (ast.For, ast.While)), isinstance(s, _TRIES)
        self.needed = live_before([s], needed, self.everything)
        if loops or tries or isinstance(s, ast.With):  # what comes in is computed outside
            before = self._finish(self.needed & self.pending.keys(), s)
            self.pending = {}
        else:
            before = self._finish(self._endangered_by_head(heads, s, needed), s)
        conditions, test = self.conditions, copy.deepcopy(getattr(s, "test", None))
        for field_ in ("test", "iter", "subject"):
            if hasattr(s, field_):
                setattr(s, field_, self.visit(getattr(s, field_)))
        for item in getattr(s, "items", []):
            item.context_expr = self.visit(item.context_expr)
        read = set().union(*(names_in(head, self.owner) for head in heads), set())
        self.made = {n: maker for n, maker in self.made.items() if n not in read and not loops}
        made = self.made
        if loops:
            inside = {n for n in map(assigned_name, ast.walk(s)) if n in self.variables}
            self.pending = {name: _Pending(self.everything, set()) for name in inside}
            again = live_before(s.body, needed | names_in(s, None), self.everything)
            needed_in_body = needed | again | names_in(heads[0], None)
        else:
            needed_in_body = needed
        outer_try, self.in_try = self.in_try, self.in_try or tries
        entry, entry_made, ends, ends_made = dict(self.pending), dict(self.made), [], []
        blocks = [(s, "body"), (s, "orelse"), (s, "finalbody")]
        blocks += [(h, "body") for h in (*getattr(s, "handlers", []), *getattr(s, "cases", []))]
        for owner, field_ in blocks:
            block = getattr(owner, field_, None) or []
            self.pending, self.made = dict(entry), dict(entry_made)
            if isinstance(s, ast.If):
                self.conditions = (*conditions, (copy.deepcopy(test), field_ == "body"))
            new = self._block(block, needed_in_body if field_ == "body" else needed)
            if block and isinstance(s, (ast.With, *_TRIES)):
                if not isinstance(block[-1], (ast.Return, ast.Raise, ast.Continue, ast.Break)):
                    new += self._finish(set(self.pending), block[-1])
                self.pending = {}
            if block:
                setattr(owner, field_, new)
            if not block or not isinstance(block[-1], (ast.Return, ast.Raise)):
                ends.append(self.pending)
                ends_made.append(self.made)
        self.in_try, self.conditions = outer_try, conditions
        self.pending = {}
        for end in ends:
            for name, p in end.items():
                other = self.pending.get(name, _Pending(set(), set()))
                self.pending[name] = _Pending(p.reached | other.reached, p.sites | other.sites)
        self.made = {
            name: maker for name, maker in made.items() if all(name in end for end in ends_made)
        }
        return [*before, s]

    def _endangered_by_head(self, heads: list[ast.expr], s: ast.stmt, needed: set[str]) -> set[str]:
        live = {
            *live_before(s.body, needed, self.everything),
            *live_before(s.orelse, needed, self.everything),
        }
        self.needed = live
        return self._endangered(heads)


def _loads(node: ast.AST) -> dict[str, int]:
    """How often each name is read, but for shape and dtype, and pairs that are fused whole."""
    counts: dict[str, int] = {}
    metadata = {
        id(n.value)
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and n.attr in (*_METADATA, "size", "dim")
    }
    for n in ast.walk(node):
        if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load) and id(n) not in metadata:
            counts[n.id] = counts.get(n.id, 0) + 1
        if found := _swish(n):
            counts[found[0]] = counts.get(found[0], 0) - 1
        kind, a, b = _binary(n) or ("", n, n)
        for g, product in ((a, b), (b, a)):  # g + g * s
            factor, c, d = _binary(product) or ("", n, n)
            if kind == "add" and factor == "mul" and _is_name(g):
                if _is_name(c, g.id) or _is_name(d, g.id):
                    counts[g.id] = counts.get(g.id, 0) - 1
    return counts


def _only_metadata(s: ast.stmt, name: str) -> bool:
    stored = any(
        isinstance(n, ast.Name) and n.id == name and not isinstance(n.ctx, ast.Load)
        for n in ast.walk(s)
    )
    # After rewriting, metadata of a variable is read as like(h).dtype.
    like = {
        id(n.args[0])
        for n in ast.walk(s)
        if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "_fastdiff_like"
    }
    plain = {
        id(n.value) for n in ast.walk(s) if isinstance(n, ast.Attribute) and n.attr in _METADATA
    }
    reads = [n for n in ast.walk(s) if _is_name(n, name) and isinstance(n.ctx, ast.Load)]
    return not stored and all(id(n) in like or id(n) in plain for n in reads)


def _augmented(definition: ast.FunctionDef) -> ast.FunctionDef:
    """`h.add_(t)` and `h = h.add_(t)` as `h += t`, which says what they do."""

    class Augment(ast.NodeTransformer):
        def _from(self, s: ast.stmt) -> ast.stmt:
            e = s.value
            if _function_name(e) == "add_" and len(e.args) == 1 and _is_name(e.func.value):
                name = e.func.value.id
                if isinstance(s, ast.Expr) or assigned_name(s) == name:
                    new = ast.AugAssign(ast.Name(name, ast.Store()), ast.Add(), e.args[0])
                    new.is_method = True
                    return ast.copy_location(new, s)
            return s

        visit_Expr = visit_Assign = _from

    return Augment().visit(definition)


def _restored(s: ast.AugAssign) -> ast.stmt:
    if not getattr(s, "is_method", False):
        return s
    method = ast.Attribute(ast.Name(s.target.id, ast.Load()), "add_", ast.Load())
    new = ast.Assign([s.target], ast.Call(method, [s.value], []))
    return ast.fix_missing_locations(ast.copy_location(new, s))
