"""`compile_pass`: group_norm, SiLU and time embedding in any captured graph become one op.

model = torch.compile(model, backend="fastdiff")            # Inductor behind the pass
fastdiff.compile_pass(torch.fx.symbolic_trace(model))       # or by itself
fastdiff.compile_pass(torch.export.export(model, args).module())
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
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
_SUMS = {operator.add, torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar}
_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod")
}
_OP = torch.ops.fastdiff.group_norm_silu.default


def compile_pass(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``silu(group_norm(x + t) * (1 + s) + u)`` and its parts into `ops.group_norm_silu`.

    Finds the calls that torch.compile, torch.fx.symbolic_trace and torch.export leave in a graph:
    functions, methods and aten operators, and nn.GroupNorm and nn.SiLU where a tracer kept
    them whole; ``h * sigmoid(h)`` counts as SiLU. Steps in front of and behind the normalization
    are taken in if nothing else uses what they compute, and if nothing is written in place
    between them. A time embedding (t, s, u) must be known to have the shape (B, C, 1, 1), so the
    graph needs shapes, as those of torch.compile and torch.export have. What is not an image,
    (N, C), is left to torch. The graph is changed in place.

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
            _replace(graph_module, arguments, _site(graph_module, node, arguments[0]), target)
            count += 1
    # Only what the replacements left over: fx would also drop calls that write in place.
    graph_module.graph.eliminate_dead_code(
        lambda node: not (node.op == "get_attr" or node.target in _SUMS)
    )
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
    original = getattr(type(module), "_fastdiff_original", None) or type(module)  # of a patched one
    if original.forward is not nn.GroupNorm.forward:
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


def _tensor(node: Any) -> Tensor | None:
    """The fake tensor that a graph with shapes has for a node's value."""
    meta = node.meta if isinstance(node, fx.Node) else {}
    value = meta.get("example_value", meta.get("val"))
    return value if isinstance(value, Tensor) else None


def _target(x: fx.Node) -> Callable | None:
    """What to call for a normalization of x; None to leave it."""
    value = _tensor(x)
    if value is None:
        return group_norm_silu_any_rank
    return _OP if 3 <= value.dim() <= 5 and value.is_floating_point() else None


@dataclass
class _Site:
    """A normalization with what is fused into it: act(norm(x + channel_bias) (1 + scale) + shift).

    The last three are nodes of shape (B, C, 1, ...). `steps` are the nodes that the op replaces,
    in the order of the graph; all but the last have no other users.
    """

    x: fx.Node
    steps: list[fx.Node]
    channel_bias: fx.Node | None = None
    scale: fx.Node | None = None
    shift: fx.Node | None = None
    silu: bool = False


def _site(graph_module: fx.GraphModule, node: fx.Node, x: fx.Node) -> _Site:
    site = _Site(x, [node])
    if _tensor(x) is not None:
        if (terms := _image_and_channels(x, _SUMS)) is not None and list(x.users) == [node]:
            site.x, site.channel_bias = terms
            site.steps.insert(0, x)
        _take_scale_and_shift(site)
    if (activation := _activation_after(graph_module, site.steps[-1])) is not None:
        site.steps += [u for u in site.steps[-1].users if u is not activation] + [activation]
        site.silu = True
    if _is_written_between(graph_module, site.steps):
        return _Site(x, [node])
    return site


def _take_scale_and_shift(site: _Site) -> None:
    """Follow norm * (1 + scale) + shift, or either alone, behind the site's last step."""
    following = _only_user(site.steps[-1])
    image, factor = _image_and_channels(following, _PRODUCTS) or (None, None)
    if image is site.steps[-1] and (scale := _one_plus(factor)) is not None:
        site.scale = scale
        site.steps.append(following)
        following = _only_user(following)
    image, shift = _image_and_channels(following, _SUMS) or (None, None)
    if image is site.steps[-1]:
        site.shift = shift
        site.steps.append(following)


def _only_user(node: fx.Node) -> fx.Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 else None


def _image_and_channels(node: fx.Node | None, targets: set) -> tuple[fx.Node, fx.Node] | None:
    """The operands of image + channels or image * channels, (B, C, ...) and (B, C, 1, ...).

    None for any other node, for operands of other shapes, and where the result's dtype is not that
    of the image.
    """
    if node is None or node.target not in targets or node.kwargs or len(node.args) != 2:
        return None
    result = _tensor(node)
    for image, channels in (node.args, node.args[::-1]):
        a, b = _tensor(image), _tensor(channels)
        if result is None or a is None or b is None or not 3 <= a.dim() <= 5:
            continue
        if a.dtype != result.dtype or not b.is_floating_point() or a.device != b.device:
            continue
        expected = (*a.shape[:2], *[1] * (a.dim() - 2))
        if _same_shape(b, expected) and _same_shape(a, result.shape):
            return image, channels
    return None


def _same_shape(tensor: Tensor, shape: tuple) -> bool:
    """Whether it has the shape for certain, whatever the symbols in it turn out to be."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    pairs = zip(tensor.shape, shape, strict=False)
    return tensor.dim() == len(shape) and all(statically_known_true(a == b) for a, b in pairs)


def _one_plus(node: fx.Node) -> fx.Node | None:
    """scale, if the node is 1 + scale."""
    if node.target not in _SUMS or node.kwargs or len(node.args) != 2:
        return None
    for one, scale in (node.args, node.args[::-1]):
        if isinstance(one, (int, float)) and one == 1 and _tensor(scale) is not None:
            same = _tensor(scale).dtype == _tensor(node).dtype
            return scale if same and _same_shape(_tensor(scale), _tensor(node).shape) else None
    return None


def _is_written_between(graph_module: fx.GraphModule, steps: list[fx.Node]) -> bool:
    """Whether a node among the steps, which will all run where the last one stands, may write."""
    node = steps[0]
    while node is not steps[-1]:
        node = node.next
        if node not in steps and _may_write(graph_module, node):
            return True
    return False


def _may_write(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    if node.op == "call_module":
        return getattr(graph_module.get_submodule(node.target), "inplace", False)
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    if name.endswith("_") or node.target in _IN_PLACE_OPERATORS:
        return True
    return any(flag is True for flag in (*node.args, *node.kwargs.values()))  # inplace=True, say


def _replace(graph_module: fx.GraphModule, arguments: tuple, site: _Site, target: Callable) -> None:
    graph, last = graph_module.graph, site.steps[-1]
    with graph.inserting_before(last):
        if target is _OP:
            operands = [
                None if operand is None else graph.call_function(torch.flatten, (operand, 1))
                for operand in (site.channel_bias, site.scale, site.shift)
            ]
            activation = ACTIVATIONS.index("silu" if site.silu else "identity")
            op = graph.call_function(_OP, (site.x, *arguments[1:], *operands, activation))
            result = graph.call_function(operator.getitem, (op, 0))
            expected = _tensor(last)
            if expected is not None and expected.dtype != _tensor(site.x).dtype:
                result = graph.call_method("to", (result, expected.dtype))  # under autocast
        else:
            result = graph.call_function(target, (site.x, *arguments[1:], site.silu))
    result.meta.update(last.meta)
    last.replace_all_uses_with(result)
    # In reverse order of use; a module call has side effects as far as fx knows.
    for old in reversed(site.steps):
        graph.erase_node(old)


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
