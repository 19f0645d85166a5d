"""What the source of an owner's method shows about each normalization that it calls."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from types import FunctionType

from torch import nn

from fastdiff.integrations.fused_modules import FusedGroupNorm
from fastdiff.integrations.recognition import is_silu
from fastdiff.integrations.rewriting import Rewritten
from fastdiff.integrations.sources import innermost

_PATHS = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Slice, ast.UnaryOp, ast.BoolOp,
    ast.Compare, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context,
)  # fmt: skip
_UNKNOWN = object()


def steps_at_sites(
    owner: nn.Module, function: FunctionType, rewritten: Rewritten
) -> Iterator[tuple[nn.Module, set[str]]]:
    """The normalizations that `function` calls, and what is fused with each.

    Whether a sum is a time embedding, and which branch is taken, shows only when it runs.
    """
    function = innermost(function) or function

    def evaluate(path: ast.expr | None) -> object:
        if path is None or not all(isinstance(n, _PATHS) for n in ast.walk(path)):
            return _UNKNOWN
        if isinstance(path, ast.Name) and path.id in rewritten.locals:
            return evaluate(rewritten.locals[path.id])
        code = compile(ast.fix_missing_locations(ast.Expression(path)), "<path>", "eval")
        try:
            return eval(code, function.__globals__, {rewritten.owner: owner})
        except Exception:  # a local name, or what does not exist in this instance
            return _UNKNOWN

    for site in rewritten.sites:
        outcomes = [(evaluate(test), expected) for test, expected in site.conditions]
        if any(is_ is not _UNKNOWN and bool(is_) != expected for is_, expected in outcomes):
            continue  # not in this instance
        steps = {"channel_bias"} if site.has_sum else set()
        if site.has_scale_shift:
            steps.add("scale_shift")
        if any(path is None or _is_silu(evaluate(path)) for path in site.activations):
            steps.add("silu")
        called = [owner] if site.is_functional else list(_norms(evaluate(site.callee), owner))
        for m in called:
            yield m, steps


def _is_silu(f: object) -> bool:
    return is_silu(next(iter(f), None) if isinstance(f, nn.Sequential) else f)


def _norms(called: object, owner: nn.Module) -> Iterator[nn.Module]:
    if called is _UNKNOWN:  # one of a list
        for m in owner._modules.values():
            if isinstance(m, (nn.ModuleList, nn.ModuleDict)):
                yield from _norms(m, owner)
    elif isinstance(called, FusedGroupNorm):
        yield called
    elif isinstance(called, nn.Sequential):
        yield from _norms(next(iter(called), None), owner)
    elif isinstance(called, (nn.ModuleList, nn.ModuleDict)):
        for m in called._modules.values():
            yield from _norms(m, owner)
