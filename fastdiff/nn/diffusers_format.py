"""U-Nets in the folder format of diffusers, read and written without importing diffusers.

A folder written by `save_pretrained` is a `DDPMPipeline`::

    model_index.json
    unet/config.json                             # UNet2DModel
    unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json              # DDPMScheduler

The parameters of `fastdiff.nn.UNet` have the names and shapes of UNet2DModel's, so only the
configuration is translated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff.nn.config import UNetConfig

# The oldest version whose UNet2DModel has every setting used here.
DIFFUSERS_VERSION = "0.30.0"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

PREDICTION_TYPES = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range")

# UNet2DModel settings that our U-Net knows with one value only.
_FIXED_SETTINGS: dict[str, Any] = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "class_embed_type": None,
}

# UNet2DModel's blocks by how they resample and whether they have attention.
_BLOCKS = {
    ("conv", False): "{}Block2D",
    ("conv", True): "Attn{}Block2D",
    ("resnet", False): "Resnet{}sampleBlock2D",
    ("resnet", True): "Attn{}Block2D",
}

# Attention of checkpoints written before diffusers 0.15.
_LEGACY_ATTENTION = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}


class UnsupportedByDiffusersError(ValueError):
    """The network or process has no equivalent in diffusers' UNet2DModel or DDPMScheduler."""


def unet2d_config(config: UNetConfig) -> dict[str, Any]:
    """The settings of the UNet2DModel that computes the same as a `UNet` with `config`.

    A class-conditional network becomes one with ``num_class_embeds``; diffusers' own DDPMPipeline
    loads it but has no way to pass class labels: call its ``unet`` with ``class_labels``.

    Raises
    ------
    UnsupportedByDiffusersError
        Average resampling outside of residual blocks, several attention heads on levels of
        different widths, a time embedding of another width than the first level's, or
        self-conditioning.
    """
    if config.self_conditioning:
        raise UnsupportedByDiffusersError(
            "self_conditioning=True has no equivalent in diffusers, whose pipelines give a network "
            "no estimate of x0"
        )
    if not (config.conv_resample or config.resblock_updown):
        raise UnsupportedByDiffusersError(
            "conv_resample=False has no equivalent in UNet2DModel, which resamples by convolution"
        )
    if config.widths[0] != config.channels:
        raise UnsupportedByDiffusersError(
            f"a first level of {config.widths[0]} channels and a time embedding of "
            f"{config.channels}: UNet2DModel has one width for both"
        )
    kind = "resnet" if config.resblock_updown else "conv"
    has_attention = [size in config.attention_resolutions for size in config.resolutions]
    return {
        **_FIXED_SETTINGS,
        "sample_size": config.sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.widths),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": [_BLOCKS[kind, a].format("Down") for a in has_attention],
        "up_block_types": [_BLOCKS[kind, a].format("Up") for a in has_attention[::-1]],
        "downsample_type": kind,
        "upsample_type": kind,
        "add_attention": config.mid_attention,
        "attention_head_dim": _head_dim(config),
        "dropout": config.dropout,
        "flip_sin_to_cos": config.time_embedding == "openai",
        "freq_shift": 1 if config.time_embedding == "ddpm" else 0,
        "resnet_time_scale_shift": (
            "scale_shift" if config.time_conditioning == "scale_shift" else "default"
        ),
        "downsample_padding": 0 if config.downsample_padding == "right" else 1,
        "norm_num_groups": config.num_groups,
        # Left to itself UNet2DModel drops this norm when the time embedding is scale_shift.
        "attn_norm_num_groups": config.num_groups,
        "norm_eps": config.norm_eps,
        "num_class_embeds": config.num_class_embeddings,
    }


def _head_dim(config: UNetConfig) -> int | None:
    """UNet2DModel fixes the channels per head. None: one head."""
    if config.num_head_channels is not None:
        return config.num_head_channels
    if config.num_heads == 1:
        return None
    widths = set(config.attention_widths)
    if len(widths) > 1:
        raise UnsupportedByDiffusersError(
            f"num_heads = {config.num_heads} on attention levels of different widths, "
            f"{sorted(widths)}: UNet2DModel has one number of channels per head for all levels"
        )
    return widths.pop() // config.num_heads if widths else None


def config_from_unet2d(settings: Mapping[str, Any]) -> UNetConfig:
    """The `UNetConfig` of a network that computes the same as a UNet2DModel with `settings`.

    A network whose class embedding has a row for "no label" looks like one with a class more;
    set ``null_class`` on the result when you know better.

    Raises
    ------
    UnsupportedByDiffusersError
        The UNet2DModel has a feature that our U-Net lacks.
    """
    for name, value in _FIXED_SETTINGS.items():
        if settings.get(name, value) != value:
            raise UnsupportedByDiffusersError(
                f"UNet2DModel with {name} = {settings[name]!r}; only {value!r} is supported"
            )
    widths = settings["block_out_channels"]
    size = settings["sample_size"]
    if not isinstance(size, int):
        raise UnsupportedByDiffusersError(
            f"UNet2DModel with sample_size = {size!r}; only one integer is supported"
        )
    down, up = settings["down_block_types"], settings["up_block_types"]
    kind = settings.get("downsample_type", "conv")
    types = {_BLOCKS.get((kind, a), "").format("Down"): a for a in (False, True)}
    mirrored = [name.replace("Up", "Down") for name in reversed(up)]
    if (
        not set(down) <= set(types)
        or list(down) != mirrored
        or settings.get("upsample_type", "conv") != kind
    ):
        raise UnsupportedByDiffusersError(
            f"UNet2DModel with down_block_types = {down}, up_block_types = {up}, downsample_type = "
            f"{kind!r} and upsample_type = {settings.get('upsample_type', 'conv')!r}; supported "
            'are (Attn)DownBlock2D and (Attn)UpBlock2D in the reverse order with "conv", and '
            'AttnDownBlock2D, ResnetDownsampleBlock2D and their reverse with "resnet"'
        )
    freq_shift = settings.get("freq_shift", 0)
    embedding = {(False, 1): "ddpm", (True, 0): "openai"}.get(
        (settings.get("flip_sin_to_cos", True), freq_shift)
    )
    if embedding is None:
        raise UnsupportedByDiffusersError(
            f"UNet2DModel with flip_sin_to_cos = {settings.get('flip_sin_to_cos', True)} and "
            f"freq_shift = {freq_shift}; supported are (False, 1) and (True, 0)"
        )
    in_channels, out_channels = settings.get("in_channels", 3), settings.get("out_channels", 3)
    if out_channels not in (in_channels, 2 * in_channels):
        raise UnsupportedByDiffusersError(
            f"UNet2DModel with {in_channels} input and {out_channels} output channels; supported "
            "are as many, or twice as many"
        )
    attention = [size >> i for i, name in enumerate(down) if types[name]]
    mid_attention = settings.get("add_attention", True)
    config = UNetConfig(
        sample_size=size,
        in_channels=in_channels,
        learned_variance=out_channels == 2 * in_channels,
        channels=widths[0],
        channel_mult=tuple(
            width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths
        ),
        num_res_blocks=settings.get("layers_per_block", 2),
        attention_resolutions=tuple(attention),
        mid_attention=mid_attention,
        **_heads(settings, [w for w, n in zip(widths, down, strict=True) if types[n]]),
        dropout=settings.get("dropout", 0.0),
        time_embedding=embedding,
        time_conditioning=(
            "scale_shift"
            if settings.get("resnet_time_scale_shift") == "scale_shift"
            else "additive"
        ),
        resblock_updown=kind == "resnet",
        downsample_padding="both" if settings.get("downsample_padding", 1) else "right",
        num_groups=settings.get("norm_num_groups", 32),
        norm_eps=settings.get("norm_eps", 1e-5),
        num_classes=settings.get("num_class_embeds"),
    )
    expected_groups = config.num_groups
    groups = settings.get("attn_norm_num_groups")
    if groups is None and config.time_conditioning == "additive":
        groups = expected_groups
    if mid_attention and groups != expected_groups:
        raise UnsupportedByDiffusersError(
            f"UNet2DModel with attn_norm_num_groups = {groups}; only {expected_groups}, as in the "
            "other normalizations, is supported"
        )
    return config


def _heads(settings: Mapping[str, Any], attention_widths: list[int]) -> dict[str, int]:
    """`num_heads`, or `num_head_channels` where levels differ in their heads."""
    head_dim = settings.get("attention_head_dim", 8)
    widths = set(attention_widths)
    if settings.get("add_attention", True):
        widths.add(settings["block_out_channels"][-1])
    if head_dim is None or not widths:
        return {"num_heads": 1}
    heads = {width // head_dim for width in widths}
    if any(width % head_dim for width in widths):
        raise UnsupportedByDiffusersError(
            f"UNet2DModel with attention_head_dim = {head_dim} on levels of "
            f"{sorted(widths)} channels, which it does not divide"
        )
    return {"num_heads": heads.pop()} if len(heads) == 1 else {"num_head_channels": head_dim}


def ddpm_scheduler_config(
    betas: torch.Tensor | Sequence[float],
    prediction: str = "eps",
    variance: str = "fixed_large",
    clip_denoised: bool = True,
) -> dict[str, Any]:
    """The settings of the DDPMScheduler that runs the reverse process of a trained network.

    The betas are written out one by one ("trained_betas"), so every schedule is exact.

    Parameters
    ----------
    betas : (T,)
        Of the schedule the network was trained with.
    prediction : {"eps", "x0", "v"}
        What the network predicts.
    variance : {"fixed_small", "fixed_large", "learned", "learned_range"}
    clip_denoised : bool
        Clip the predicted x0 to [-1, 1].

    Raises
    ------
    UnsupportedByDiffusersError
        DDPMScheduler has no such prediction or variance.
    """
    if prediction not in PREDICTION_TYPES:
        raise UnsupportedByDiffusersError(
            f"prediction must be one of {', '.join(PREDICTION_TYPES)} for DDPMScheduler, "
            f"got {prediction!r}"
        )
    if variance not in VARIANCE_TYPES:
        raise UnsupportedByDiffusersError(
            f"variance must be one of {', '.join(VARIANCE_TYPES)} for DDPMScheduler, "
            f"got {variance!r}"
        )
    betas = torch.as_tensor(betas, dtype=torch.float64).tolist()
    return {
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "beta_schedule": "linear",
        "prediction_type": PREDICTION_TYPES[prediction],
        "variance_type": variance,
        "clip_sample": clip_denoised,
        "clip_sample_range": 1.0,
        "timestep_spacing": "leading",
    }


def save_unet(unet: torch.nn.Module, folder: str | Path) -> None:
    """Write `unet` so that ``diffusers.UNet2DModel.from_pretrained(folder)`` loads it.

    Raises
    ------
    UnsupportedByDiffusersError
        UNet2DModel cannot express the network (see `unet2d_config`); nothing is written.
    ValueError
        Weights are not finite; nothing is written.
    ModuleNotFoundError
        safetensors is not installed (it comes with ``pip install fastdiff[train]``).
    """
    from safetensors.torch import save_file

    settings = unet2d_config(unet.config)
    weights = unet.state_dict().values()
    bad = sum(int((~w.detach().isfinite()).sum()) for w in weights)
    if bad:
        total = sum(w.numel() for w in weights)
        raise ValueError(f"{bad} of {total} weights are not finite; nothing was written")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors stores row-major tensors only; a channels_last weight is not one.
    tensors = {name: p.detach().cpu().contiguous() for name, p in unet.state_dict().items()}
    save_file(tensors, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    _write_json(folder / "config.json", {"_class_name": "UNet2DModel", **version, **settings})


def save_pretrained(
    unet: torch.nn.Module, folder: str | Path, schedule_config: Mapping[str, Any]
) -> None:
    """Write `unet` so that ``diffusers.DDPMPipeline.from_pretrained(folder)`` loads it.

    Parameters
    ----------
    unet : fastdiff.UNet
        On any device, in any dtype and memory format.
    folder : path
        Made if missing; files of the same names are replaced.
    schedule_config : mapping
        Settings of DDPMScheduler, from `ddpm_scheduler_config`.

    Raises
    ------
    UnsupportedByDiffusersError
        UNet2DModel cannot express the network (see `unet2d_config`); nothing is written.
    ModuleNotFoundError
        safetensors is not installed (it comes with ``pip install fastdiff[train]``).
    """
    folder = Path(folder)
    save_unet(unet, folder / "unet")
    (folder / "scheduler").mkdir(exist_ok=True)
    version = {"_diffusers_version": DIFFUSERS_VERSION}
    _write_json(
        folder / "scheduler" / "scheduler_config.json",
        {"_class_name": "DDPMScheduler", **version, **schedule_config},
    )
    _write_json(
        folder / "model_index.json",
        {
            "_class_name": "DDPMPipeline",
            **version,
            "scheduler": ["diffusers", "DDPMScheduler"],
            "unet": ["diffusers", "UNet2DModel"],
        },
    )


def read(source: str | Path | torch.nn.Module) -> tuple[UNetConfig, dict[str, torch.Tensor]]:
    """Configuration and weights of `fastdiff.UNet` from a UNet2DModel: of a module, a copy.

    Of a folder those of the UNet2DModel in it or in ``folder/unet``, as a pipeline has it.

    Raises
    ------
    FileNotFoundError
        The folder has no config.json or no safetensors weights.
    UnsupportedByDiffusersError
        The UNet2DModel has a feature that our U-Net lacks.
    """
    if isinstance(source, torch.nn.Module):
        settings = dict(source.config)
        state = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    else:
        from safetensors.torch import load_file

        folder = Path(source)
        if (folder / "unet" / "config.json").is_file():
            folder = folder / "unet"
        settings = json.loads((folder / "config.json").read_text())
        state = load_file(folder / WEIGHTS_NAME)
    legacy = re.compile(rf"(attentions\.\d+)\.({'|'.join(_LEGACY_ATTENTION)})\.")
    renamed = {
        legacy.sub(lambda m: f"{m[1]}.{_LEGACY_ATTENTION[m[2]]}.", name): tensor
        for name, tensor in state.items()
    }
    return config_from_unet2d(settings), renamed


def to_module(unet: torch.nn.Module) -> torch.nn.Module:
    """A ``diffusers.UNet2DModel`` with the architecture and a copy of the weights of `unet`.

    Raises
    ------
    UnsupportedByDiffusersError
        UNet2DModel cannot express the network (see `unet2d_config`).
    ModuleNotFoundError
        diffusers is not installed (it comes with ``pip install fastdiff[diffusers]``).
    """
    from diffusers import UNet2DModel

    module = UNet2DModel(**unet2d_config(unet.config))
    module.load_state_dict(unet.state_dict())
    first = next(unet.parameters())
    return module.to(device=first.device, dtype=first.dtype).train(unet.training)


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
