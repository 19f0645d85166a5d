"""The expressions of a normalization's owner, with those that fuse as calls of `deferred`."""

from __future__ import annotations

import ast
import copy
from dataclasses import dataclass, field

from fastdiff.integrations import deferred
from fastdiff.integrations._flow import METADATA, SCOPES, Aliases, assigned_name, names_in, writers
from fastdiff.integrations._patterns import (
    augmented,
    binary,
    cast,
    function_name,
    is_name,
    one_plus,
    sole_argument,
    swish,
)

HELPERS = {
    f"_fastdiff_{name}": getattr(deferred, name)
    for name in (
        "add", "add_in_place", "addcmul", "apply", "call", "cast", "early", "group_norm", "like",
        "now", "scaled", "scaled_sum", "settle", "swish", "UNASSIGNED",
    )
}  # fmt: skip


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
class Pending:
    """A variable that may hold a Deferred here."""

    reached: set[str]
    """Names through which the memory can be written that it stands for."""
    sites: set[int]
    """Of which normalizations, by id of the call."""
    is_sum: bool = False
    """Whether it may be a sum that a normalization reads."""


class Expressions(ast.NodeTransformer):
    def __init__(self, definition: ast.FunctionDef, norms: frozenset[str]) -> None:
        self.definition, self.norms = augmented(definition), norms
        self.owner = definition.args.args[0].arg
        self.conditions: tuple[tuple[ast.expr, bool], ...] = ()
        self.fuses = 0
        nodes = list(ast.walk(definition))
        inner: list[ast.AST] = [n for n in nodes if isinstance(n, SCOPES) and n is not definition]
        for n in nodes:
            if isinstance(n, ast.GeneratorExp):  # all but its first iterable is read later
                first, *rest = n.generators
                inner += [n.elt, *first.ifs, *rest]
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
        read = [cast(call.args[0]) or call.args[0] for call in calls]
        self.read_by_norms = {e.id for e in read if is_name(e)}
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
            if isinstance(e, ast.Attribute) and is_name(e.value, self.owner):
                return e.attr in self.norms
            if not isinstance(e, (ast.Attribute, ast.Subscript)):
                return False
            e = e.value

    def _is_norm_call(self, e: ast.AST) -> bool:
        if self._is_functional(e):
            return True
        x = sole_argument(e)
        return x is not None and not e.keywords and self._is_part(e.func, self.locals)

    def _is_functional(self, e: ast.AST) -> bool:
        """F.group_norm(x, ...)."""
        if not isinstance(e, ast.Call) or not e.args or isinstance(e.args[0], ast.Starred):
            return False
        f = e.func
        if isinstance(f, ast.Attribute):
            return f.attr == "group_norm" and not is_name(f.value, self.owner)
        return is_name(f, "group_norm")

    def _variables(self, nodes: list[ast.AST]) -> set[str]:
        """All that may hold a Deferred anywhere, found until there are no more."""
        self.pending = dict.fromkeys(self.read_by_norms)  # as sums
        while True:
            before = len(self.pending)
            for node in nodes:
                name = None if isinstance(node, ast.AugAssign) else assigned_name(node)
                if name is not None and self._may_defer(node.value):
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
        if (image := cast(e)) is not None:
            return self._may_defer(image)
        kind, a, b = binary(e) or ("", e, e)
        if kind == "add":
            return early or self._open(a, b) or self._open(b, a)
        if kind == "mul":
            return any(self._open(x, s) and one_plus(s) for x, s in ((a, b), (b, a)))
        return False

    def _open(self, image: ast.expr, other: ast.expr) -> bool:
        """Whether image may be deferred until `other`, beside it, was evaluated."""
        if not self._may_defer(image):
            return False
        reached = names_in(image, self.owner)
        return not any(names is None or reached & names for _, names in writers(other, self.owner))

    def _addcmul(self, e: ast.AST | None) -> bool:
        if function_name(e) != "addcmul" or len(e.args) != 3:
            return False
        return self._open(e.args[1], e.args[2]) and one_plus(e.args[2]) is not None

    def _scaled_sum(self, e: ast.AST | None) -> tuple[str, ast.expr] | None:
        """(g, s) of g + g * s."""
        kind, a, b = binary(e) or ("", e, e)
        for g, product in ((a, b), (b, a)):
            factor, c, d = binary(product) or ("", e, e)
            if kind == "add" and factor == "mul" and is_name(g) and g.id in self.pending:
                for same, s in ((c, d), (d, c)):
                    if is_name(same, g.id):
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
        if e is not None and (image := cast(e)) is not None:
            return self._sites_of(image)
        _, a, b = binary(e) or ("", None, None)
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
        if (found := swish(node)) and found[0] in self.pending:
            self._note(ast.Name(found[0], ast.Load()), None)
            return self._at(node, self._fuse("swish", ast.Name(found[0], ast.Load()), found[1]))
        if self._may_defer(node):
            return self._at(node, self._helper("now", self._deferred(node)))
        argument = sole_argument(node)
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
            value = e.value if isinstance(e, ast.Attribute) and e.attr in METADATA else None
        return is_name(value) and value.id in self.pending

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
                self.visit(one_plus(factor)),
            )  # fmt: skip
        if found := self._scaled_sum(e):
            self._mark_scaled(e)
            return self._fuse("scaled_sum", ast.Name(found[0], ast.Load()), self.visit(found[1]))
        if (image := cast(e)) is not None:
            name = ast.Constant(e.func.attr)
            return self._helper("cast", self._deferred(image), name, *map(self.visit, e.args))
        kind, a, b = binary(e)
        if kind == "mul":
            self._mark_scaled(e)
            image, factor = (a, b) if self._open(a, b) and one_plus(b) else (b, a)
            return self._fuse("scaled", self._deferred(image), self.visit(one_plus(factor)))
        return self._fuse("early" if early else "add", self._deferred(a), self._deferred(b))

    def _mark_scaled(self, e: ast.expr) -> None:
        for site in self._sites_of(e):
            self.sites[site].has_scale_shift = True

    def _norm_call(self, e: ast.Call) -> ast.expr:
        x, *rest = e.args
        is_sum = (binary(x) or ("",))[0] == "add"
        added = self._added_in_argument(x)
        inner = added or self._deferred(x, early=is_sum)
        site = self.sites[id(e)]
        held = self.pending.get(getattr(cast(x) or x, "id", None))
        site.has_sum = is_sum or bool(added) or (held is not None and held.is_sum)
        site.conditions = self.conditions
        self._note(x, e.func)  # a Sequential that goes on where this one stopped
        if not self._is_functional(e):
            return self._helper("call", self.visit(e.func), inner)
        owner = ast.Name(self.owner, ast.Load())
        made = self._fuse("group_norm", owner, e.func, inner, *map(self.visit, rest))
        made.keywords = [ast.keyword(k.arg, self.visit(k.value)) for k in e.keywords]
        return made

    def _added_in_argument(self, x: ast.expr) -> ast.Call | None:
        """norm(h.add_(t)): as `h += t` in front of it, if h is not read again."""
        if function_name(x) != "add_" or len(x.args) != 1 or not is_name(x.func.value):
            return None
        name = x.func.value.id
        if name not in self.made or name in self.needed or self.counts.get(name, 0) > 1:
            return None
        return self._in_place(name, x.args[0], True)

    def _in_place(self, name: str, value: ast.expr, method: bool) -> ast.Call:
        target = ast.Name(name, ast.Load())
        maker = copy.deepcopy(self.made[name])
        return self._fuse("add_in_place", target, self.visit(value), maker, ast.Constant(method))
