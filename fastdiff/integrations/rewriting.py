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
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import FunctionType

from fastdiff.integrations._expressions import HELPERS, Expressions, Pending, Site
from fastdiff.integrations._flow import SCOPES, assigned_name, live_before, names_in, writers
from fastdiff.integrations._patterns import binary, is_name, loads, only_metadata, restored
from fastdiff.integrations.sources import definition_of, names_in_code, recompiled

_TRIES = ast.Try, ast.Match, getattr(ast, "TryStar", ast.Try)
_LEAVES = ast.Return, ast.Raise, ast.Break, ast.Continue
_FORBIDDEN = (ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal)
_REFLECTION = {"locals", "vars", "eval", "exec", "globals"}


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
    if names_in_code(function).isdisjoint({*norms, "group_norm"}):
        return Rewritten(None)
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
    made = recompiled(function, body, HELPERS) if rewriter.fuses else None
    return Rewritten(made, tuple(rewriter.sites.values()), rewriter.owner, rewriter.locals)


class _Rewriter(Expressions):
    """Statement by statement, with what variables may hold where each one runs.

    `pending`: a Deferred. `made`: a new tensor that nobody else has, by the part of the owner that
    made it.
    """

    def run(self) -> ast.FunctionDef:
        body = self.definition.body
        self.everything = {n.id for n in ast.walk(self.definition) if isinstance(n, ast.Name)}
        self.in_try = False
        self.pending, self.made = {}, {}
        self.deferring: set[str] = set()
        done = self._block(body, set())
        parameters = {a.arg for a in ast.walk(self.definition.args) if isinstance(a, ast.arg)}
        unassigned = sorted(self.deferring - parameters)
        if unassigned:
            targets = [ast.Name(name, ast.Store()) for name in unassigned]
            first = ast.Assign(targets, ast.Name("_fastdiff_UNASSIGNED", ast.Load()))
            done.insert(0, self._at(body[0], first))
        self.definition.body = done
        return self.definition

    def _block(self, block: list[ast.stmt], after: set[str]) -> list[ast.stmt]:
        """The block rewritten; `after`: what is read behind it."""
        done: list[ast.stmt] = []
        for i, s in enumerate(block):
            if self.in_try:  # an exception may lead anywhere
                needed = self.everything
            elif isinstance(s, (ast.Return, ast.Raise)):
                needed = set()
            else:
                needed = live_before(block[i + 1 :], after, self.everything)
            if isinstance(s, (ast.For, ast.While)):
                done += self._loop(s, needed)
            elif isinstance(s, (ast.If, ast.With, *_TRIES)):
                done += self._branches(s, needed)
            elif isinstance(s, (ast.Break, ast.Continue)):
                done += [*self._finish(self.pending, s), s]
            elif isinstance(s, SCOPES):
                done.append(s)
            else:
                done += self._statement(s, needed)
        return done

    def _finish(self, names: Iterable[str], at: ast.stmt) -> list[ast.stmt]:
        """`v = settle(v)` for pending variables."""
        done = []
        for name in sorted({*names} & self.pending.keys()):
            del self.pending[name]
            value = self._helper("settle", ast.Name(name, ast.Load()))
            done.append(self._at(at, ast.Assign([ast.Name(name, ast.Store())], value)))
        return done

    def _finish_all(self, needed: set[str], at: ast.stmt) -> list[ast.stmt]:
        """For all that is needed; what is not is forgotten."""
        done = self._finish(needed, at)
        self.pending = {}
        return done

    def _statement(self, s: ast.stmt, needed: set[str]) -> list[ast.stmt]:
        name = assigned_name(s)
        self.needed, self.counts = needed - {name}, loads(s)
        before = self._finish(self._endangered(s), s)
        held = names_in(s, self.owner)
        held |= set().union(*(p.reached for n, p in self.pending.items() if n in held), set())
        value = getattr(s, "value", None)
        sites, maker = self._sites_of(value), self._maker(s)
        is_sum = isinstance(s, ast.AugAssign) or (binary(value) or ("",))[0] == "add"
        mentioned = {n for n in self.made if not only_metadata(s, n)}
        new, is_deferred = self._simple(s, name)
        self.made = {n: made for n, made in self.made.items() if n not in mentioned}
        if name is not None:
            self.pending.pop(name, None)
            if is_deferred:
                reached = self.aliases.of(held | {name})
                self.pending[name] = Pending(reached, sites, is_sum and not sites)
                self.deferring.add(name)
            if maker is not None:
                self.made[name] = maker
        return [*before, new]

    def _simple(self, s: ast.stmt, name: str | None) -> tuple[ast.stmt, bool]:
        """The statement, and whether it assigns what may be a Deferred."""
        if isinstance(s, ast.AugAssign):
            if name in self.made and name in self.variables and isinstance(s.op, ast.Add):
                value = self._in_place(name, s.value, getattr(s, "is_method", False))
                return self._at(s, ast.Assign([ast.Name(name, ast.Store())], value)), True
            s.value = self.visit(s.value)
            return restored(s), False
        if name not in self.variables or s.value is None:
            return self.generic_visit(s), False
        early = name in self.read_by_norms
        is_deferred = self._may_defer(s.value, early)
        s.value = self._deferred(s.value, early)
        return s, is_deferred

    def _endangered(self, part: ast.AST) -> set[str]:
        """Pending variables to finish before this part runs: it may write in what they stand for,
        or they are read again."""
        found = {n for n, count in self.counts.items() if count > 1 or n in self.needed}
        if isinstance(part, ast.AugAssign):
            found.add(assigned_name(part))
        for node, names in writers(part, self.owner):
            inside = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
            late = self.pending.keys() & (self.needed | (self.counts.keys() - inside))
            for name in late:
                if names is None or self.pending[name].reached & self.aliases.of(names):
                    found.add(name)
        return found

    def _maker(self, s: ast.stmt) -> ast.expr | None:
        """`self.conv` of h = self.conv(...)."""
        if not isinstance(s, ast.Assign) or not isinstance(s.value, ast.Call):
            return None
        f = s.value.func
        is_part = isinstance(f, ast.Attribute) and is_name(f.value, self.owner)
        return copy.deepcopy(f) if is_part else None

    def _branches(self, s: ast.stmt, needed: set[str]) -> list[ast.stmt]:
        """if, with, try and match. Into and out of all but the first nothing is deferred."""
        is_if, outer_try, conditions = isinstance(s, ast.If), self.in_try, self.conditions
        heads = [s.test] if is_if else [i.context_expr for i in getattr(s, "items", [])]
        heads += [s.subject] if isinstance(s, ast.Match) else []
        before = self._head(heads, live_before([s], needed, self.everything), s, is_if)
        if is_if:
            test, s.test = copy.deepcopy(s.test), self.visit(s.test)
        elif isinstance(s, ast.Match):
            s.subject = self.visit(s.subject)
        for item in getattr(s, "items", []):
            item.context_expr = self.visit(item.context_expr)
        self.in_try |= isinstance(s, _TRIES)
        entry, ends = (self.pending, self.made), []
        owners = [s, *getattr(s, "handlers", []), *getattr(s, "cases", [])]
        for owner in owners:
            for name in ("body", "orelse", "finalbody"):
                block = getattr(owner, name, None) or []
                self.pending, self.made = map(dict, entry)
                if is_if:
                    self.conditions = (*conditions, (test, name == "body"))
                if block:
                    new = self._block(block, needed)
                    if not is_if and not isinstance(block[-1], _LEAVES):
                        new += self._finish_all(self.everything if self.in_try else needed, s)
                    setattr(owner, name, new)
                if not block or not isinstance(block[-1], _LEAVES):
                    ends.append((self.pending if is_if else {}, self.made))
        self.in_try, self.conditions = outer_try, conditions
        self._join(ends)
        return [*before, s]

    def _join(self, ends: list[tuple[dict, dict]]) -> None:
        """What may be pending behind branches that end so; and what is made in all of them."""
        self.pending = {}
        for pending, _ in ends:
            for name, p in pending.items():
                q = self.pending.get(name, Pending(set(), set()))
                self.pending[name] = Pending(
                    p.reached | q.reached, p.sites | q.sites, p.is_sum or q.is_sum
                )
        first = ends[0][1] if ends else {}
        self.made = {
            name: maker
            for name, maker in first.items()
            if all(made.get(name) is maker for _, made in ends)
        }

    def _head(
        self, heads: list[ast.expr], live: set[str], s: ast.stmt, goes_on: bool
    ) -> list[ast.stmt]:
        """What to finish before the head of a compound statement runs."""
        mentioned = set().union(*(names_in(head, self.owner) for head in heads), set())
        self.made = {n: maker for n, maker in self.made.items() if n not in mentioned}
        if not goes_on:
            return self._finish_all(live, s)
        (head,) = heads
        self.needed, self.counts = live, loads(head)
        return self._finish(self._endangered(head), s)

    def _loop(self, s: ast.For | ast.While, needed: set[str]) -> list[ast.stmt]:
        """A for loop may defer from one turn to the next; nothing comes in."""
        is_for = isinstance(s, ast.For)
        live = live_before([s], needed, self.everything)
        before = self._head([s.iter if is_for else s.test], live, s, False)
        self.made = {}
        if is_for:
            s.iter = self.visit(s.iter)
            assigned = {assigned_name(n) for n in ast.walk(s)} & self.variables
            self.pending = {name: Pending(self.everything, set()) for name in assigned}
        else:
            s.test = self.visit(s.test)
        last = s.body[-1]
        body = self._block(s.body, needed | live | live_before(s.body, live, self.everything))
        if not is_for and not isinstance(last, _LEAVES):
            body += self._finish_all(self.everything, s)
        s.body, pending = body, self.pending
        s.orelse = self._block(s.orelse, needed)
        self._join([(pending, {}), (self.pending, {})])
        return [*before, s]
