"""The U-Net of DDPM and its descendants (Math §11)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastdiff._backends import default_backend, forced_backend
from fastdiff._types import check_tensors
from fastdiff.nn import diffusers_format, original_formats
from fastdiff.nn.attention import SelfAttention
from fastdiff.nn.blocks import (
    DownBlock,
    MidBlock,
    ResnetBlock,
    UpBlock,
    new_dropout_keys,
    norm_conv,
    number_dropout,
)
from fastdiff.nn.config import UNetConfig
from fastdiff.nn.embedding import TimestepEmbedding
from fastdiff.nn.group_norm_silu import GroupNormSiLU
from fastdiff.nn.inference import InferenceUNet, why_no_inference_form
from fastdiff.nn.merging import Merged, mergeable, merged_maps
from fastdiff.nn.presets import preset_config

torch.fx.wrap("new_dropout_keys")


class UNet(nn.Module):
    """U-Net ``unet(x_t, t, y=None) -> (B, C or 2C, H, W)``.

    Parameters are named as in diffusers' ``UNet2DModel``, so that the state dicts are the same.
    ``unet.to(memory_format=torch.channels_last)`` makes every activation channels_last.

    Parameters
    ----------
    config : UNetConfig
        Kept as `unet.config`; `UNet.from_config(unet.config.to_dict())` builds the same network.

    Notes
    -----
    Initialisation is that of DDPM's code: variance scaling "fan_avg uniform" (Glorot) for
    convolutions and linear maps, zero biases, and zeros for the last convolution of each residual
    block, the output of each attention and the last convolution of the network, which the code
    draws with scale 1e-10. The class embedding is N(0, 1).

    References
    ----------
    Ho et al. 2020 (DDPM), appendix B; Nichol & Dhariwal 2021 (IDDPM), appendix A.

    Examples
    --------
    >>> import torch, fastdiff
    >>> unet = fastdiff.UNet.from_preset("digits")
    >>> eps = unet(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]))
    >>> eps.shape
    torch.Size([2, 1, 8, 8])
    """

    recompute = False
    use_inference_form = True
    """Whether samplers and bounds call `for_inference()` in its place, where they can."""
    merged: bool | None = None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        if not isinstance(config, UNetConfig):
            raise TypeError(
                f"config must be a UNetConfig, got {type(config).__name__}; "
                "UNet.from_config takes a dict, UNet.from_preset a name"
            )
        self.config = config
        widths = config.widths
        embed_dim = 4 * config.channels
        inputs = config.in_channels * (2 if config.self_conditioning else 1)
        self.conv_in = nn.Conv2d(inputs, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(config.channels, embed_dim, config.time_embedding)
        self.class_embedding = (
            None
            if config.num_class_embeddings is None
            else nn.Embedding(config.num_class_embeddings, embed_dim)
        )

        # Channels of every tensor that the way down hands over to the way up.
        skip_channels = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            self.down_blocks.append(DownBlock(skip_channels[-1], level, config))
            is_last = level == len(widths) - 1
            skip_channels += [width] * (config.num_res_blocks + (not is_last))
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList()
        in_channels = widths[-1]
        for level in reversed(range(len(widths))):
            skips = [skip_channels.pop() for _ in range(config.num_res_blocks + 1)]
            self.up_blocks.append(UpBlock(in_channels, skips, level, config))
            in_channels = widths[level]

        self.conv_norm_out = GroupNormSiLU(config.num_groups, widths[0], config.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], config.out_channels, 3, padding=1)
        number_dropout(self)
        self.reset_parameters()

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> UNet:
        """Build a named architecture, e.g. ``UNet.from_preset("ddpm_cifar10", num_classes=10)``.

        Parameters
        ----------
        name : str
            A key of `fastdiff.nn.PRESETS`.
        **overrides
            Fields of `UNetConfig` to change.

        Raises
        ------
        ValueError
            The name is unknown (the message lists the known ones), or the overrides do not fit.
        """
        return cls(preset_config(name, **overrides))

    @classmethod
    def from_config(cls, config: UNetConfig | Mapping[str, Any]) -> UNet:
        """Build the network that `config`, a UNetConfig or its `to_dict()`, describes."""
        return cls(config if isinstance(config, UNetConfig) else UNetConfig.from_dict(config))

    @classmethod
    def from_diffusers(cls, source: str | os.PathLike[str] | nn.Module) -> UNet:
        """Load a ``UNet2DModel``: a local folder (of it or of its pipeline), or the module itself.

        The weights are copied; the network is in eval mode. diffusers need not be installed to
        load a folder.

        Raises
        ------
        FileNotFoundError
            The folder has no config.json or no safetensors weights.
        fastdiff.nn.diffusers_format.UnsupportedByDiffusersError
            The UNet2DModel has a feature that this U-Net lacks.
        """
        config, state = diffusers_format.read(source)
        unet = cls._without_weights(config)
        unet.load_state_dict(state, assign=True)
        return unet.eval()

    @classmethod
    def from_original(
        cls,
        source: str | os.PathLike[str] | Mapping[str, torch.Tensor],
        config: str | UNetConfig,
        *,
        new_attention_order: bool | None = None,
    ) -> UNet:
        """Load a checkpoint of DDPM's or DDIM's PyTorch code, or of improved- or guided-diffusion.

        Parameters
        ----------
        source : path or mapping
            A .pt, .pth, .ckpt or .safetensors file, or the state dict itself. Of DDIM's training
            checkpoints the averaged weights are taken. Files are read without running code.
        config : str or UNetConfig
            The network's architecture: the name of a preset or of a released network
            (`fastdiff.nn.RELEASED`), or a configuration.
        new_attention_order : bool, optional
            guided-diffusion's flag of that name; None: that of the released network of the
            configuration's shapes, False for others.

        Raises
        ------
        FileNotFoundError
        fastdiff.nn.original_formats.UnknownCheckpointError
            No such format, or names or shapes do not fit the configuration. Or the configuration
            has the shapes of a released network of OpenAI's and other heads: tensors do not tell
            them, so that the weights would load and compute something else.

        Notes
        -----
        The released upsamplers take the small image, enlarged (bilinear), as `x_self_cond`.
        """
        unet = cls._without_weights(preset_config(config) if isinstance(config, str) else config)
        original_formats.load_into(unet, source, new_attention_order=new_attention_order)
        return unet.requires_grad_(True).eval()

    @classmethod
    def _without_weights(cls, config: UNetConfig) -> UNet:
        """On the meta device: initial values would only be thrown away."""
        with torch.device("meta"):
            return cls(config)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the network as ``diffusers.UNet2DModel.from_pretrained(folder)`` reads it.

        `fastdiff.nn.diffusers_format.save_pretrained` writes a whole DDPMPipeline.

        Raises
        ------
        fastdiff.nn.diffusers_format.UnsupportedByDiffusersError
            UNet2DModel cannot express the network; nothing is written.
        """
        diffusers_format.save_unet(self, folder)

    def to_diffusers(self) -> nn.Module:
        """A ``diffusers.UNet2DModel`` with a copy of the weights that computes the same.

        Raises
        ------
        fastdiff.nn.diffusers_format.UnsupportedByDiffusersError
            UNet2DModel cannot express the network.
        ModuleNotFoundError
            diffusers is not installed.
        """
        return diffusers_format.to_module(self)

    def set_recompute(self, enabled: bool = True) -> UNet:
        """Whether the normalized activations are computed again in the backward pass.

        The input of every convolution behind a normalization is then not kept, which is half of
        what residual blocks keep (docs/performance.md); the gradients are the same bit for bit. Off
        at first, and not part of the config: it changes nothing that is computed.
        """
        for module in self.modules():
            if isinstance(module, (ResnetBlock, UNet)):
                module.recompute = enabled
        return self

    def for_inference(self, dtype: torch.dtype = torch.float32) -> InferenceUNet:
        """The same network as a CPU computes it fastest, without gradients: see `InferenceUNet`.

        Kept with the U-Net, beside whose weights it holds up to 1.8 times their memory (half of
        that in bfloat16). Samplers use it by themselves.

        Parameters
        ----------
        dtype : torch.float32 or torch.bfloat16
            What it computes in.

        Raises
        ------
        TypeError
            Another dtype.
        ValueError
            The U-Net is not float32 on a CPU, or was changed: hooks, other modules, another
            forward pass.

        Examples
        --------
        >>> import torch, fastdiff
        >>> unet = fastdiff.UNet.from_preset("digits")
        >>> eps = unet.for_inference()(torch.randn(2, 1, 8, 8), torch.tensor([0, 999]))
        """
        if type(self) is not UNet:
            raise ValueError(f"{type(self).__name__} has no inference form: it is no plain UNet")
        forms = self.__dict__.setdefault("_inference_forms", {})
        if dtype not in forms:
            forms[dtype] = InferenceUNet(self, dtype)
        return forms[dtype]

    def sampling_form(self, dtype: torch.dtype = torch.float32) -> InferenceUNet | UNet:
        """What samplers call in its place: the inference form, or itself where there is none.

        That is on other devices, without compiled CPU kernels or with another backend asked for,
        under autocast, where `for_inference` refuses, and with `use_inference_form` off.
        """
        if (
            not self.use_inference_form
            or default_backend("cpu") != "cpu"
            or (forced_backend() or os.environ.get("FASTDIFF_BACKEND") or "cpu") != "cpu"
            or torch.is_autocast_enabled("cpu")
            or type(self) is not UNet
            or why_no_inference_form(self) is not None
        ):
            return self
        return self.for_inference(dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and files of the module have no inference form, whose weights are copies."""
        return {k: v for k, v in super().__getstate__().items() if k != "_inference_forms"}

    def set_merged(self, enabled: bool | None = None) -> UNet:
        """Whether maps of one input are computed as one (`fastdiff.nn.merging`).

        That is fewer kernels for the same function, up to rounding. None, as at first: on CUDA
        devices. Never where such a map is not what this class made it: has a hook, is of another
        class or sharded.
        """
        self.merged = enabled
        return self

    def _merged(self, temb: torch.Tensor) -> Merged | None:
        weight = self.conv_in.weight
        if not (weight.is_cuda if self.merged is None else self.merged):
            return None
        resnets = [module for module in self.modules() if isinstance(module, ResnetBlock)]
        attentions = [module for module in self.modules() if isinstance(module, SelfAttention)]
        if not mergeable(merged_maps(resnets, attentions)):
            return None
        return Merged(resnets, attentions, temb)

    def reset_parameters(self) -> None:
        """Initialise all parameters anew (see the class notes)."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.Embedding, GroupNormSiLU)):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, SelfAttention):
                nn.init.zeros_(module.to_out[0].weight)
        nn.init.zeros_(self.conv_out.weight)

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        x_self_cond: torch.Tensor | None = None,
        dropout_keys: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Predict from noisy images.

        Parameters
        ----------
        x_t : (B, C, H, W) floating point
            Noisy images; H and W multiples of `config.size_divisor`. Pixels of x0 are in [-1, 1].
        t : (B,) int64, int32 or floating point
            0-based timestep.
        y : (B,) int64, for a class-conditional network only
            Class, 0 <= y < num_classes; with `null_class`, num_classes means unconditional.
        x_self_cond : (B, C, H, W), for a self-conditioned network only
            An estimate of x0 to start from; None: there is none yet (zeros).
        dropout_keys : (B,) int64
            What the masks of dropout are made from, one key for each sample (Math §9): the same
            key, the same masks, whatever the batch around the sample. None: in training mode they
            are drawn from torch's random state. Not looked at in eval mode.

        Returns
        -------
        (B, C, H, W), or (B, 2C, H, W) with a learned variance
            In the memory format of `x_t`.

        Raises
        ------
        ValueError, TypeError
            A shape, dtype or class does not fit. The range of a CUDA `y` is checked only under
            FASTDIFF_DEBUG=1, because the check waits for the device.
        """
        if not isinstance(x_t, torch.fx.Proxy):  # torch.fx traces without shapes
            self._check_inputs(x_t, t, y, x_self_cond, dropout_keys)
        if dropout_keys is None and self.training and self.config.dropout:
            dropout_keys = new_dropout_keys(x_t)
        temb = self.time_embedding(t)
        if self.class_embedding is not None:
            temb = temb + self.class_embedding(y)
        temb = F.silu(temb)
        if not isinstance(x_t, torch.fx.Proxy) and (merged := self._merged(temb)):
            temb = merged

        if self.config.self_conditioning:
            estimate = torch.zeros_like(x_t) if x_self_cond is None else x_self_cond
            x_t = torch.cat([x_t, estimate], 1)
        h = self.conv_in(x_t)
        skips = [h]
        for block in self.down_blocks:
            skips += block(skips[-1], temb, dropout_keys)
        h = self.mid_block(skips[-1], temb, dropout_keys)
        for block in self.up_blocks:
            is_last = block is self.up_blocks[-1] and not self.recompute
            h, normed = block(h, skips, temb, dropout_keys, self.conv_norm_out if is_last else None)
        if normed is not None:
            return self.conv_out(normed)
        return norm_conv(self.conv_norm_out, self.conv_out, h, recompute=self.recompute)

    def _check_inputs(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None,
        x_self_cond: torch.Tensor | None,
        dropout_keys: torch.Tensor | None = None,
    ) -> None:
        config = self.config
        check_tensors("UNet", x_t=x_t, t=t)
        if x_t.dim() != 4 or x_t.shape[1] != config.in_channels:
            raise ValueError(
                f"x_t must have shape (B, {config.in_channels}, H, W), got {tuple(x_t.shape)}"
            )
        batch, _, height, width = x_t.shape
        divisor = config.size_divisor
        if height % divisor or width % divisor or not height or not width:
            raise ValueError(
                f"height and width of x_t must be multiples of {divisor} for the "
                f"{len(config.widths)} levels of this U-Net ({divisor}, {2 * divisor}, "
                f"{3 * divisor}, ...; it was made for {config.sample_size}), "
                f"got {height} x {width}"
            )
        if t.shape != (batch,):
            raise ValueError(
                f"t must have shape (B,) = ({batch},), one timestep per image, got {tuple(t.shape)}"
            )
        if t.dtype not in (torch.int64, torch.int32) and not t.is_floating_point():
            raise TypeError(f"t must be int64, int32 or floating point, got {t.dtype}")
        if x_self_cond is not None:
            check_tensors("UNet", x_self_cond=x_self_cond)
            if not config.self_conditioning:
                raise ValueError(
                    "x_self_cond was given, but this U-Net takes no estimate of x0; set "
                    "self_conditioning"
                )
            if x_self_cond.shape != x_t.shape:
                raise ValueError(
                    f"x_self_cond must have the shape of x_t, {tuple(x_t.shape)}, got "
                    f"{tuple(x_self_cond.shape)}"
                )
        if dropout_keys is not None:
            check_tensors("UNet", dropout_keys=dropout_keys)
            if dropout_keys.shape != (batch,) or dropout_keys.dtype != torch.int64:
                raise ValueError(
                    f"dropout_keys must be int64 of shape (B,) = ({batch},), one key per image, "
                    f"got {dropout_keys.dtype} of shape {tuple(dropout_keys.shape)}"
                )
        if config.num_classes is None:
            if y is not None:
                raise ValueError(
                    "y was given, but this U-Net has no classes; set num_classes to make it "
                    "class-conditional"
                )
            return
        null = f", or {config.num_classes} for no class" if config.null_class else ""
        if y is None:
            raise ValueError(
                f"y is required: this U-Net is conditional on {config.num_classes} classes{null}"
            )
        check_tensors("UNet", y=y)
        if y.shape != (batch,):
            raise ValueError(f"y must have shape (B,) = ({batch},), got {tuple(y.shape)}")
        if y.dtype != torch.int64:
            raise TypeError(f"y must be int64, got {y.dtype}")
        if _may_read(y) and batch:
            low, high = int(y.min()), int(y.max())
            if low < 0 or high >= config.num_class_embeddings:
                raise ValueError(
                    f"y must be in 0 .. {config.num_classes - 1}{null}, got values in "
                    f"{low} .. {high}"
                )


def _may_read(tensor: torch.Tensor) -> bool:
    """Whether looking at the values is free: not while tracing, not if it waits for a device."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return tensor.device.type == "cpu" or os.environ.get("FASTDIFF_DEBUG") == "1"
