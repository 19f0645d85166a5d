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

from fastdiff.integrations.conv_bias import take_bias
from fastdiff.ops import group_norm_silu
from fastdiff.reference.group_norm_silu import ACTIVATIONS

_NORMS = {F.group_norm, torch.group_norm, torch.ops.aten.group_norm.default}
_SILUS = {
    F.silu,
    torch.ops.aten.silu.default,
    torch.ops.aten.silu_.default,
}
_SIGMOIDS = {torch.sigmoid, F.sigmoid, torch.ops.aten.sigmoid.default}
_PRODUCTS = {operator.mul, torch.mul, torch.ops.aten.mul.Tensor, "mul"}  # names are of methods
_SUMS = {operator.add, torch.add, torch.ops.aten.add.Tensor, torch.ops.aten.add.Scalar, "add"}
_SUMS_IN_PLACE = {operator.iadd, torch.ops.aten.add_.Tensor, "add_"}
_ADDCMULS = {torch.addcmul, torch.ops.aten.addcmul.default, "addcmul"}
_INSTANCE_NORMS = {F.instance_norm, torch.instance_norm, torch.ops.aten.instance_norm.default}
_LAYER_NORMS = {F.layer_norm, torch.layer_norm, torch.ops.aten.layer_norm.default}
_CASTS = {"float", "half", "bfloat16", "to", "type", torch.ops.aten.to.dtype}
_CONVOLUTIONS = {
    *(getattr(torch, f"conv{d}d") for d in (1, 2, 3)),
    *(getattr(torch.ops.aten, f"conv{d}d").default for d in (1, 2, 3)),
    *(getattr(torch, f"conv_transpose{d}d") for d in (1, 2, 3)),
    F.linear,
    torch.ops.aten.linear.default,
    torch.ops.aten.convolution.default,
}
_IN_PLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("setitem", "delitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod")
}
_OP = torch.ops.fastdiff.group_norm_silu.default


def compile_pass(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Rewrite ``silu(group_norm(x + t) * (1 + s) + u)`` and its parts into `ops.group_norm_silu`.

    Finds the calls that torch.compile, torch.fx.symbolic_trace and torch.export leave in a graph:
    functions, methods and aten operators, and nn.GroupNorm and nn.SiLU where a tracer kept
    them whole. ``h * sigmoid(h)`` counts as SiLU, ``torch.addcmul`` and ``g + g * s`` as scale and
    shift, ``h += t`` on the result of a convolution as a sum, instance normalization as a group
    normalization; casts to float32 and back around a normalization go, as the op computes in
    float32 and rounds once; on CUDA devices the bias of a convolution in front becomes a channel
    bias, which spares a kernel. Steps in front of and behind the normalization
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
    _drop_casts(graph_module)
    _name_in_place_sums(graph_module)
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
    if node.op == "call_function" and node.target in _INSTANCE_NORMS | _LAYER_NORMS:
        return _as_group_norm(node)
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


def _as_group_norm(node: fx.Node) -> tuple | None:
    """An instance norm without running statistics, or a layer norm of images without parameters."""
    if node.target in _INSTANCE_NORMS:
        names = "input running_mean running_var weight bias use_input_stats momentum eps"
        if node.target is not F.instance_norm:
            names = "input weight bias running_mean running_var use_input_stats momentum eps"
        values = {"running_mean": None, "running_var": None, "use_input_stats": True}
    else:
        names, values = "input normalized_shape weight bias eps", {}
    values |= {"weight": None, "bias": None, "eps": 1e-5}
    values |= dict(zip(names.split(), node.args, strict=False)) | dict(node.kwargs)
    x, parameters = _tensor(values["input"]), (values["weight"], values["bias"])
    if x is None or not 3 <= x.dim() <= 5 or not isinstance(x.shape[1], int):
        return None
    if node.target in _INSTANCE_NORMS:
        is_plain = values["running_mean"] is None and values["use_input_stats"]
        num_groups = x.shape[1] if is_plain else None
    else:
        is_of_images = tuple(x.shape[1:]) == tuple(values["normalized_shape"])
        num_groups = 1 if is_of_images and parameters == (None, None) else None
    return num_groups and (values["input"], num_groups, *parameters, values["eps"])


def _drop_casts(graph_module: fx.GraphModule) -> None:
    """Casts that do nothing, and those of GroupNorm32: to float32 in front of a normalization and
    back behind it."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if (source := _cast_of(node)) is None:
            continue
        a, b = _tensor(source), _tensor(node)
        if a.dtype == b.dtype:
            for user in list(source.users):  # torch.export's note that the cast does nothing
                if user.target is torch.ops.aten._assert_tensor_metadata.default:
                    graph.erase_node(user)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
            continue
        norm = _only_user(node)
        back = norm if norm is None else _only_user(norm)
        if back is None or norm.op != "call_function" or norm.target not in _NORMS:
            continue
        is_there_and_back = _cast_of(back) is norm and _tensor(back).dtype == a.dtype
        if is_there_and_back and norm.args[:1] == (node,) and b.dtype == torch.float32:
            norm.replace_input_with(node, source)
            norm.meta.update(back.meta)
            back.replace_all_uses_with(norm)
            graph.erase_node(back)
            graph.erase_node(node)


def _name_in_place_sums(graph_module: fx.GraphModule) -> None:
    """Let what reads h behind h.add_(t) read the sum, which is the same tensor."""
    nodes = list(graph_module.graph.nodes)
    position = {node: i for i, node in enumerate(nodes)}
    for node in nodes:
        if node.target in _SUMS_IN_PLACE and isinstance(node.args[0], fx.Node):
            for user in list(node.args[0].users):
                if position[user] > position[node]:
                    user.replace_input_with(node.args[0], node)


def _cast_of(node: fx.Node) -> fx.Node | None:
    """What a node casts to a floating-point dtype, on its device and in its layout."""
    if node.target not in _CASTS or node.op not in ("call_method", "call_function"):
        return None
    if len(node.args) > 2 or any(k != "dtype" for k in node.kwargs):
        return None
    source = node.args[0] if node.args else None
    a, b = _tensor(source), _tensor(node)
    if a is None or b is None or a.device != b.device or not a.is_floating_point():
        return None
    return source if b.is_floating_point() else None


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
        terms = _image_and_channels(x, _SUMS) or _in_place_sum(graph_module, x)
        if terms is not None and list(x.users) == [node]:
            site.x, site.channel_bias = terms
            site.steps.insert(0, x)
        _take_scale_and_shift(site)
    if (activation := _activation_after(graph_module, site.steps[-1])) is not None:
        site.steps += [u for u in site.steps[-1].users if u is not activation] + [activation]
        site.silu = True
    if _is_written_between(graph_module, site.steps):
        return _Site(x, [node])
    return site


def _in_place_sum(graph_module: fx.GraphModule, node: fx.Node) -> tuple | None:
    """The operands of h += t where nothing else has h."""
    terms = _image_and_channels(node, _SUMS_IN_PLACE)
    if terms is None or terms[0] is not node.args[0] or _only_user(terms[0]) is not node:
        return None
    return terms if _is_new(graph_module, terms[0]) else None


def _is_new(graph_module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether its value is a tensor that a convolution made, or that was then added to."""
    while node.target in _SUMS_IN_PLACE and _only_user(node.args[0]) is node:
        node = node.args[0]
    if node.op == "call_module":
        module = graph_module.get_submodule(node.target)
        return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
    return node.op == "call_function" and node.target in _CONVOLUTIONS


def _take_scale_and_shift(site: _Site) -> None:
    """Follow norm * (1 + scale) + shift, or a part or another form of it, behind the last step."""
    norm = site.steps[-1]
    following = _only_user(norm)
    if following is not None and following.target in _ADDCMULS and len(following.args) == 3:
        shift, image, factor = following.args
        scale = None if image is not norm or following.kwargs else _one_plus(factor)
        if scale is not None and _is_per_channel(shift, norm) and _is_per_channel(factor, norm):
            site.scale, site.shift = scale, shift
            site.steps.append(following)
        return
    if (found := _scaled_sum(norm)) is not None:
        product, total, site.scale = found
        site.steps += [product, total]
        following = _only_user(total)
    else:
        image, factor = _image_and_channels(following, _PRODUCTS) or (None, None)
        if image is norm and (scale := _one_plus(factor)) is not None:
            site.scale = scale
            site.steps.append(following)
            following = _only_user(following)
    image, shift = _image_and_channels(following, _SUMS) or (None, None)
    if image is site.steps[-1]:
        site.shift = shift
        site.steps.append(following)


def _scaled_sum(norm: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(g * s, g + g * s, s), if g is used there only."""
    users = list(norm.users)
    if len(users) != 2:
        return None
    for product, total in (users, users[::-1]):
        image, scale = _image_and_channels(product, _PRODUCTS) or (None, None)
        if image is not norm or _only_user(product) is not total or total.target not in _SUMS:
            continue
        if not total.kwargs and {*total.args} == {norm, product}:
            return product, total, scale
    return None


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
        a = _tensor(image)
        if result is None or a is None or a.dtype != result.dtype:
            continue
        if _is_per_channel(channels, image) and _same_shape(a, result.shape):
            return image, channels
    return None


def _is_per_channel(channels: Any, image: fx.Node) -> bool:
    """Whether the node has shape (B, C, 1, ...) to an image (B, C, ...)."""
    a, b = _tensor(image), _tensor(channels)
    if a is None or b is None or not 3 <= a.dim() <= 5:
        return False
    if not b.is_floating_point() or a.device != b.device:
        return False
    return _same_shape(b, (*a.shape[:2], *[1] * (a.dim() - 2)))


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
            if (bias := take_bias(graph_module, site.x, _tensor(site.x))) is not None:
                operands[0] = _plus_bias(graph, site.x, operands[0], bias)
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


def _plus_bias(graph: fx.Graph, x: fx.Node, channel_bias: fx.Node | None, bias: fx.Node) -> fx.Node:
    """(B, C): the channel bias, if there is one, and that of a convolution."""
    if channel_bias is not None:
        return graph.call_function(torch.add, (channel_bias, bias))
    batch = graph.call_method("size", (x, 0))
    return graph.call_method("expand", (bias, batch, -1))


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
