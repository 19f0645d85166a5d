"""UNetConfig: everything that defines a U-Net, as a JSON-serialisable value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastdiff.reference.checks import shown

TIME_EMBEDDINGS = ("ddpm", "openai")
TIME_CONDITIONINGS = ("additive", "scale_shift")
DOWNSAMPLE_PADDINGS = ("right", "both")


@dataclasses.dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Architecture of a U-Net (Math §11).

    Level ``i = 0 .. L-1`` works at ``sample_size / 2**i`` pixels with
    ``channels * channel_mult[i]`` channels.

    Parameters
    ----------
    sample_size : int
        Height and width of the images the network is made for, divisible by ``2**(L-1)``.
    in_channels : int
        C, image channels.
    learned_variance : bool
        Return 2C channels: the prediction, then the interpolation of the log variance
        (IDDPM eq. 15).
    channels : int
        What `channel_mult` multiplies, and the width of the sinusoidal time embedding.
    channel_mult : tuple of int or float
        Width of each level, in `channels`; its length is the number L of levels.
    num_res_blocks : int
        Residual blocks per level on the way down; the way up has one more.
    attention_resolutions : tuple of int
        The resolutions, in pixels, whose residual blocks are followed by self-attention.
    mid_attention : bool
        Self-attention between the two residual blocks at the lowest resolution.
    num_heads : int
        Attention heads of every attention.
    num_head_channels : int, optional
        Channels of every attention head, in place of `num_heads`: wider levels have more heads.
    dropout : float
        Probability, inside the residual blocks.
    time_embedding : {"ddpm", "openai"}
        Sinusoidal embedding of t: [sin, cos] with frequencies ``exp(-ln(10000) k / (half - 1))``,
        or [cos, sin] with ``exp(-ln(10000) k / half)``.
    time_conditioning : {"additive", "scale_shift"}
        How the embedding enters a residual block: added before its second normalization (DDPM), or
        as scale and shift after it (AdaGN).
    conv_resample : bool
        Resample with a convolution (stride 2; nearest neighbour and 3x3), or without (2x2 average;
        nearest neighbour).
    resblock_updown : bool
        Resample without convolutions inside residual blocks of their own, as BigGAN does (Dhariwal
        & Nichol 2021, §3), in place of what `conv_resample` says.
    downsample_padding : {"right", "both"}
        Where the stride-2 convolution pads with zeros: below and to the right only (DDPM, from
        TensorFlow's "SAME"), or one pixel all around (OpenAI).
    num_groups : int
        Groups of every normalization; divides the width of every level.
    norm_eps : float
        Added to the variance of every normalization.
    num_classes : int, optional
        Number of classes of a class-conditional network; None: unconditional.
    null_class : bool
        Add the class ``num_classes``, which stands for "no label": what classifier-free guidance
        trains by dropping labels and uses as the unconditional prediction.
    self_conditioning : bool
        Take an estimate of x0 as C more input channels (Chen et al. 2022, arXiv 2208.04202).

    Raises
    ------
    ValueError
        Values that do not fit together, or an unknown name (the message lists the valid ones).
    """

    sample_size: int
    in_channels: int = 3
    learned_variance: bool = False
    channels: int = 128
    channel_mult: tuple[int | float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: tuple[int, ...] = (16,)
    mid_attention: bool = True
    num_heads: int = 1
    num_head_channels: int | None = None
    dropout: float = 0.0
    time_embedding: str = "ddpm"
    time_conditioning: str = "additive"
    conv_resample: bool = True
    resblock_updown: bool = False
    downsample_padding: str = "right"
    num_groups: int = 32
    norm_eps: float = 1e-6
    num_classes: int | None = None
    null_class: bool = False
    self_conditioning: bool = False

    def __post_init__(self) -> None:
        # JSON has no tuples: lists are as good on the way in.
        for name in ("channel_mult", "attention_resolutions"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        self._check_numbers()
        self._check_names()
        self._check_sizes()

    @property
    def out_channels(self) -> int:
        """C, or 2C with a learned variance."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level."""
        return tuple(int(self.channels * mult) for mult in self.channel_mult)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height and width in pixels at each level."""
        return tuple(self.sample_size >> level for level in range(len(self.channel_mult)))

    @property
    def attention_widths(self) -> tuple[int, ...]:
        """Channels of the levels with attention, and of the one between the ways down and up."""
        levels = zip(self.widths, self.resolutions, strict=True)
        widths = [width for width, size in levels if size in self.attention_resolutions]
        return (*widths, self.widths[-1]) if self.mid_attention else tuple(widths)

    def heads(self, width: int) -> int:
        """Attention heads of an attention over `width` channels."""
        return self.num_heads if self.num_head_channels is None else width // self.num_head_channels

    @property
    def size_divisor(self) -> int:
        """Height and width of an input must be multiples of this."""
        return 2 ** (len(self.channel_mult) - 1)

    @property
    def num_class_embeddings(self) -> int | None:
        """Rows of the class embedding, or None without classes."""
        return None if self.num_classes is None else self.num_classes + self.null_class

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values that `json.dump` writes."""
        fields = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> UNetConfig:
        """Inverse of `to_dict`.

        Raises
        ------
        ValueError
            A field is unknown or missing, or the values do not fit together.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(fields) - set(names))
        if unknown:
            raise ValueError(
                f"unknown U-Net setting {', '.join(unknown)}; the settings are {', '.join(names)}"
            )
        if "sample_size" not in fields:
            raise ValueError("the U-Net setting sample_size is missing")
        return cls(**fields)

    def replace(self, **changes: Any) -> UNetConfig:
        """A copy with some fields changed, checked like a new one."""
        return self.from_dict({**self.to_dict(), **changes})

    def _check_numbers(self) -> None:
        counts = ["sample_size", "in_channels", "channels", "num_res_blocks", "num_heads"]
        counts += ["num_groups"]
        counts += [n for n in ("num_classes", "num_head_channels") if getattr(self, n) is not None]
        for name in counts:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {shown(value)}")
            if value >= 1 << 63 and name != "sample_size":  # which makes no tensor
                raise ValueError(f"{name} must be at most 2**63 - 1, got {shown(value)}")
        if not self.channel_mult or any(
            not isinstance(mult, (int, float))
            or not 0 < mult < 1 << 63
            or self.channels * mult % 1
            or self.channels * mult < 1
            for mult in self.channel_mult
        ):
            raise ValueError(
                f"channel_mult must be one positive number per level that makes a whole number of "
                f"channels of {self.channels}, got {self.channel_mult}"
            )
        if self.num_head_channels is not None and self.num_heads != 1:
            raise ValueError(
                f"num_heads = {self.num_heads} and num_head_channels = {self.num_head_channels} "
                "were given, expected one of them"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps must be positive, got {self.norm_eps}")
        if self.null_class and self.num_classes is None:
            raise ValueError("null_class needs num_classes: without classes there is no label")

    def _check_names(self) -> None:
        for name, valid in (
            ("time_embedding", TIME_EMBEDDINGS),
            ("time_conditioning", TIME_CONDITIONINGS),
            ("downsample_padding", DOWNSAMPLE_PADDINGS),
        ):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"{name} must be one of {', '.join(valid)}, got {value!r}")

    def _check_sizes(self) -> None:
        if self.sample_size % self.size_divisor:
            raise ValueError(
                f"sample_size must be a multiple of {self.size_divisor} for "
                f"{len(self.channel_mult)} levels, got {self.sample_size}"
            )
        absent = sorted(set(self.attention_resolutions) - set(self.resolutions))
        if absent:
            raise ValueError(
                f"attention_resolutions must be among the resolutions of the levels, "
                f"{self.resolutions}, got {self.attention_resolutions}"
            )
        if self.channels % 2 or self.channels < 4:
            raise ValueError(
                f"channels must be even and at least 4 (it is the width of the time embedding), "
                f"got {self.channels}"
            )
        for width in self.widths:
            if width % self.num_groups:
                raise ValueError(
                    f"num_groups must divide the width of every level, {self.widths}, "
                    f"got {self.num_groups}"
                )
            if width % self.num_heads:
                raise ValueError(
                    f"num_heads must divide the width of every level, {self.widths}, "
                    f"got {self.num_heads}"
                )
        if self.num_head_channels and any(
            w % self.num_head_channels for w in self.attention_widths
        ):
            raise ValueError(
                f"num_head_channels must divide the width of every level with attention, "
                f"{self.attention_widths}, got {self.num_head_channels}"
            )
