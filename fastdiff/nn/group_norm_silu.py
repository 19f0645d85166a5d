"""GroupNormSiLU: the module form of the fused group normalization."""

from __future__ import annotations

import torch
from torch import nn

from fastdiff import reference
from fastdiff.ops import group_norm_silu, residual_group_norm_silu
from fastdiff.ops._library import is_dtensor
from fastdiff.reference.group_norm_silu import ACTIVATIONS

# torch.fx's tracer puts calls of them into the graph.
torch.fx.wrap("group_norm_silu")
torch.fx.wrap("residual_group_norm_silu")


def _is_plain(x: torch.Tensor) -> bool:
    """torch.jit.trace, on which ONNX export may stand, and DTensor know torch's own operators."""
    return torch.jit.is_tracing() or is_dtensor(x)


class GroupNormSiLU(nn.Module):
    """``y = act(norm(x + channel_bias) * (1 + scale) + shift)`` with learned weight and bias.

    Takes the place of a `torch.nn.GroupNorm` and the SiLU behind it, and has the same state dict
    (``weight`` and ``bias`` of shape (C,)), so checkpoints load either way. The formula, shapes and
    dtypes are those of `fastdiff.ops.group_norm_silu`, which runs it.

    Parameters
    ----------
    num_groups : int
        G, a divisor of `num_channels`.
    num_channels : int
        C.
    eps : float
        Added to the variance.
    affine : bool
        Without it, weight and bias are None: the layer has no parameters.
    activation : {"silu", "identity"}
    device, dtype : optional
        Of the parameters.

    Raises
    ------
    ValueError
        `num_groups` does not divide `num_channels`, or `activation` is unknown.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        activation: str = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"num_groups must divide num_channels = {num_channels}, got {num_groups}"
            )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.num_groups = num_groups
        self.num_channels = num_channels
        self.eps = eps
        self.affine = affine
        self.activation = activation
        if affine:
            self.weight = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
            self.bias = nn.Parameter(torch.empty(num_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to ones and the bias to zeros."""
        if self.affine:
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: torch.Tensor,
        channel_bias: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        shift: torch.Tensor | None = None,
        **dropout: float | int | torch.Tensor,
    ) -> torch.Tensor:
        """Normalize `x` (B, C, *spatial); `channel_bias`, `scale` and `shift` are (B, C).

        `dropout_p`, `seed` and `stream` as the op takes them.
        """
        return (reference.group_norm_silu if _is_plain(x) else group_norm_silu)(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            channel_bias,
            scale,
            shift,
            self.activation,
            **dropout,
        )

    def of_sum(
        self, x: torch.Tensor, residual: torch.Tensor, sum_bias: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``s = x + residual + sum_bias`` and ``forward(s)``; `sum_bias` is (C,)."""
        op = reference.residual_group_norm_silu if _is_plain(x) else residual_group_norm_silu
        return op(
            x,
            residual,
            self.num_groups,
            self.weight,
            self.bias,
            self.eps,
            activation=self.activation,
            sum_bias=sum_bias,
        )

    def __prepare_scriptable__(self) -> GroupNormSiLU:
        """Called by torch.jit.script, for this module and for every network with one in it."""
        raise RuntimeError(
            "torch.jit.script cannot compile fastdiff's GroupNormSiLU, nor a network of it such as "
            "fastdiff.UNet; use torch.jit.trace or torch.export.export. (A network that "
            "fastdiff.patch changed is compiled as it was before; fastdiff.unpatch undoes that.)"
        )

    def extra_repr(self) -> str:
        return (
            f"{self.num_groups}, {self.num_channels}, eps={self.eps}, affine={self.affine}, "
            f"activation={self.activation!r}"
        )
