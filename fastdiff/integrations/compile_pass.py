"""`compile_pass`: silu(group_norm(x)) in any captured graph becomes one op.

model = torch.compile(model, backend="fastdiff")            # Inductor behind the pass
fastdiff.compile_pass(torch.fx.symbolic_trace(model))       # or by itself
fastdiff.compile_pass(torch.export.export(model, args).module())
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fastdiff.ops import group_norm_silu
from fastdiff.reference.group_norm_silu import ACTIVATIONS

_NORMS = {F.group_norm, torch.group_norm, torch.ops.aten.group_norm.default}
_SILUS = {
    F.silu,
    torch.ops.aten.silu.default,
    torch.ops.aten.silu_.default,
}
_SIGMOIDS = {torch.sigmoid, F.sigmoid, torch.ops.aten.sigmoid.default}
_PRODUCTS = {operator.mul, torch.mul, torch.ops.aten.mul.Tensor}
_OP = torch.ops.fastdiff.group_norm_silu.default


def compile_pass(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``silu(group_norm(x))`` and ``group_norm(x)`` into `ops.group_norm_silu`, in place.

    Finds the calls that torch.compile, torch.fx.symbolic_trace and torch.export leave in a graph:
    functions, methods and aten operators, and nn.GroupNorm and nn.SiLU where a tracer kept
    them whole; ``h * sigmoid(h)`` counts as SiLU. An activation is taken in if nothing else
    uses the normalization's result. What is not an image, (N, C), is left to torch.

    Parameters
    ----------
    graph_module
        From any of those; its inputs, outputs and parameters stay.

    Returns
    -------
    GraphModule
        The same object, recompiled; `graph_module.meta["fastdiff"]` is the number of ops put in.

    Examples
    --------
    >>> import torch, fastdiff
    >>> class Block(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm = torch.nn.GroupNorm(2, 4)
    ...
    ...     def forward(self, x):
    ...         return torch.nn.functional.silu(self.norm(x))
    >>> graph = fastdiff.compile_pass(torch.fx.symbolic_trace(Block()))
    >>> graph.meta["fastdiff"], [n.op for n in graph.graph.nodes]
    (1, ['placeholder', 'get_attr', 'get_attr', 'call_function', 'output'])
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise TypeError(
            f"compile_pass: got a {type(graph_module).__name__}, expected a torch.fx.GraphModule "
            "(from symbolic_trace, torch.export or a torch.compile backend)"
        )
    count = 0
    for node in list(graph_module.graph.nodes):
        arguments = _norm_arguments(graph_module, node)
        target = None if arguments is None else _target(arguments[0])
        if target is not None:
            _replace(graph_module, node, arguments, target)
            count += 1
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()
    graph_module.meta["fastdiff"] = count
    return graph_module


def backend(graph_module: fx.GraphModule, example_inputs: list, **options: Any) -> Callable:
    """The torch.compile backend "fastdiff": `compile_pass`, then Inductor."""
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(compile_pass(graph_module), example_inputs, **options)


def _norm_arguments(graph_module: fx.GraphModule, node: fx.Node) -> tuple | None:
    """(x, num_groups, weight, bias, eps) of a normalization; weight and bias are nodes or None."""
    if node.op == "call_function" and node.target in _NORMS:
        return _bound(node, "input", "num_groups", "weight", "bias", "eps")
    if node.op != "call_module":
        return None
    module = graph_module.get_submodule(node.target)
    if type(module).forward is not nn.GroupNorm.forward:
        return None
    with graph_module.graph.inserting_before(node):
        weight, bias = (
            None
            if getattr(module, name) is None
            else graph_module.graph.get_attr(f"{node.target}.{name}")
            for name in ("weight", "bias")
        )
    return (*_bound(node, "input"), module.num_groups, weight, bias, module.eps)


def _bound(node: fx.Node, *names: str) -> tuple:
    """Positional and keyword arguments in order; group_norm's defaults for what is missing."""
    values = {"weight": None, "bias": None, "eps": 1e-5}
    values |= dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    return tuple(values[name] for name in names)


def group_norm_silu_any_rank(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, silu: bool
) -> Tensor:
    """What the pass puts in where a graph does not say whether x is an image."""
    if 3 <= x.dim() <= 5 and x.is_floating_point():
        activation = "silu" if silu else "identity"
        return group_norm_silu(x, num_groups, weight, bias, eps, activation=activation)
    y = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(y) if silu else y


def _target(x: fx.Node) -> Callable | None:
    """What to call for a normalization of x; None to leave it."""
    for key in ("example_value", "val"):
        value = x.meta.get(key)
        if isinstance(value, Tensor):
            return _OP if 3 <= value.dim() <= 5 and value.is_floating_point() else None
    return group_norm_silu_any_rank


def _replace(
    graph_module: fx.GraphModule, node: fx.Node, arguments: tuple, target: Callable
) -> None:
    last = _activation_after(graph_module, node) or node
    silu = last is not node
    graph = graph_module.graph
    with graph.inserting_after(last):
        if target is _OP:
            activation = ACTIVATIONS.index("silu" if silu else "identity")
            result = graph.call_function(_OP, (*arguments, None, None, None, activation))
            with graph.inserting_after(result):
                result = graph.call_function(operator.getitem, (result, 0))
        else:
            result = graph.call_function(target, (*arguments, silu))
    result.meta.update(last.meta)
    last.replace_all_uses_with(result)
    # In reverse order of use; a module call has side effects as far as fx knows.
    for old in dict.fromkeys((last, *_users_between(node, last), node)):
        graph.erase_node(old)


def _users_between(node: fx.Node, last: fx.Node) -> list[fx.Node]:
    return [user for user in node.users if user is not last]


def _activation_after(graph_module: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """The node whose value is silu(node), if nothing else uses `node`."""
    users = list(node.users)
    if len(users) == 1 and _is_silu(graph_module, users[0]):
        return users[0]
    if len(users) == 2:  # h * sigmoid(h)
        for sigmoid, product in (users, users[::-1]):
            if (
                _is_sigmoid(sigmoid)
                and product.target in _PRODUCTS
                and set(product.args) == {node, sigmoid}
                and list(sigmoid.users) == [product]
            ):
                return product
    return None


def _is_silu(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _SILUS
    if node.op == "call_module":
        return type(graph_module.get_submodule(node.target)) is nn.SiLU
    return False


def _is_sigmoid(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target == "sigmoid"
    return node.op == "call_function" and node.target in _SIGMOIDS
