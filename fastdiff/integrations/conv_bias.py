"""The bias of a convolution in front of a normalization, as the op's channel bias.

On CUDA devices convolutions add their bias in a kernel of its own, which reads and writes the
whole image; the op adds one to the channels anyway. On CPUs oneDNN adds it for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

_CONVOLUTIONS = {
    *(getattr(torch, f"conv{d}d") for d in (1, 2, 3)),
    *(getattr(F, f"conv{d}d") for d in (1, 2, 3)),
    *(getattr(torch.ops.aten, f"conv{d}d").default for d in (1, 2, 3)),
    torch.ops.aten.convolution.default,
}
_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def take_bias(graph_module: fx.GraphModule, conv: fx.Node, value: Tensor | None) -> fx.Node | None:
    """The bias of a convolution on a CUDA device, from now on made without it; None to leave it.

    `value` is the fake tensor of its result; nothing but the normalization may read that.
    """
    if value is None or value.device.type != "cuda" or len(conv.users) != 1:
        return None
    if conv.op == "call_module":
        return _of_module(graph_module, conv)
    if conv.op != "call_function" or conv.target not in _CONVOLUTIONS:
        return None
    bias = conv.args[2] if len(conv.args) > 2 else conv.kwargs.get("bias")
    if not isinstance(bias, fx.Node):
        return None
    if len(conv.args) > 2:
        conv.update_arg(2, None)
    else:
        conv.update_kwarg("bias", None)
    return bias


def _of_module(graph_module: fx.GraphModule, conv: fx.Node) -> fx.Node | None:
    module = graph_module.get_submodule(conv.target)
    is_plain = type(module) in _MODULES and module.padding_mode == "zeros"
    if not is_plain or module.bias is None or len(conv.args) != 1 or conv.kwargs:
        return None
    function: Any = getattr(F, f"conv{module.weight.dim() - 2}d")
    geometry = module.stride, module.padding, module.dilation, module.groups
    with graph_module.graph.inserting_before(conv):
        weight, bias = (
            graph_module.graph.get_attr(f"{conv.target}.{name}") for name in ("weight", "bias")
        )
    conv.op, conv.target, conv.args = (
        "call_function",
        function,
        (*conv.args, weight, None, *geometry),
    )
    return bias
