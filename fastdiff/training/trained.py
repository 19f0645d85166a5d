"""A trained run, as sampling and evaluation load it from its folder."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.training import finite, posthoc_ema
from fastdiff.training.config import TrainConfig
from fastdiff.training.errors import RunError, UserError, naming
from fastdiff.training.run import RunFolder, build_diffusion, newest_checkpoint

if TYPE_CHECKING:
    from fastdiff.diffusion.gaussian import GaussianDiffusion
    from fastdiff.nn import UNet
    from fastdiff.training.data import Dataset


@dataclass(frozen=True)
class TrainedRun:
    """A run as samplers and evaluation need it.

    Attributes
    ----------
    config : TrainConfig
        The run's settings, as far as they matter those of the checkpoint.
    step : int
        Optimizer steps behind the weights.
    unet : UNet
        With averaged weights, in eval mode, on the device; see `computed`.
    ema : float
        Decay of that average, or its relative length.
    diffusion : GaussianDiffusion
        The process it was trained for.
    image_shape : tuple of int
        (C, H, W).
    """

    config: TrainConfig
    step: int
    unet: UNet
    ema: float
    diffusion: GaussianDiffusion
    image_shape: tuple[int, int, int]

    def computed(
        self,
        amp: str | None = None,
        channels_last: bool | None = None,
        compiled: bool | None = None,
    ) -> TrainedRun:
        """The run with a U-Net that computes as asked for; None: as in training.

        Its outputs are float32 whatever it computes in.
        """
        config = self.config
        amp = config.amp if amp is None else amp
        if config.channels_last if channels_last is None else channels_last:
            self.unet.to(memory_format=torch.channels_last)
        if amp == "off" and not (config.compile if compiled is None else compiled):
            return self
        network = Computed(self.unet, amp, config.compile if compiled is None else compiled)
        return dataclasses.replace(self, unet=network)


class Computed(nn.Module):
    """A U-Net under autocast ("bf16", "fp16" or "off"), or compiled; it returns float32."""

    def __init__(self, unet: UNet, amp: str, compiled: bool) -> None:
        super().__init__()
        self.unet = unet
        self.config = unet.config
        self._dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
        self._call = torch.compile(unet) if compiled else unet

    def sampling_form(self) -> Any:
        """As `UNet.sampling_form`: bfloat16 throughout in place of autocast to it."""
        if self._call is not self.unet or self._dtype is torch.float16:
            return self
        form = self.unet.sampling_form(self._dtype or torch.float32)
        return self if form is self.unet else form

    def forward(self, x_t: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        """As the U-Net's."""
        with torch.autocast(x_t.device.type, self._dtype, enabled=self._dtype is not None):
            return self._call(x_t, t, **kwargs).float()


def load_run(
    folder: str | Path,
    device: torch.device | str = "cpu",
    warn: Callable[[str], None] = warnings.warn,
    ema: float | None = None,
) -> TrainedRun:
    """Load the newest good checkpoint of a run; the folder is all that is needed.

    Model and diffusion process are those that the checkpoint describes; config.json adds how the
    run was computed. The weights are the average with decay ``ema``, or of a run with
    --posthoc-ema that of this relative length; None: the run's first.

    Raises
    ------
    UserError
        The folder holds no run, or no usable checkpoint, or the run has no such average.
    RunError
        Its weights are not finite.
    """
    run = RunFolder(Path(folder))
    config = run.saved_config("RUN")
    newest = newest_checkpoint(run, warn)
    if newest is None:
        raise UserError(f"RUN: {folder} has no checkpoint yet")
    what = f"RUN: checkpoint step-{newest.step:08d} in {folder}"
    missing = {"settings", "unet", "image_shape"} - newest.meta.keys()
    if missing:
        raise UserError(f"{what} does not say its {', '.join(sorted(missing))}")
    config = config.updated(newest.meta["settings"], what)
    with naming(what):
        config.validate()
    ema = config.ema[0] if ema is None else ema
    averages = dict(zip(config.ema, newest.emas, strict=False))
    with naming(what):
        unet = _described(newest.meta, newest.emas[0])
        image_shape = tuple(newest.meta["image_shape"])
    if ema in averages:
        weights = averages[ema]
    elif config.posthoc_ema:
        powers = newest.emas[len(config.ema) :]
        weights = posthoc_ema.reconstruct(run.averages, newest.step, powers, ema, warn)
    else:
        known = " or ".join(map(str, averages))
        raise UserError(f"--ema {ema}: {folder} has averages of decay {known}")
    bad, total = finite.count(weights.values())
    if bad:
        raise RunError(
            f"{what}: {bad:,} of {total:,} weights are not finite: training has diverged; train "
            "anew with a lower --lr"
        )
    unet.load_state_dict(weights)
    unet.eval().requires_grad_(False).to(device)
    return TrainedRun(config, newest.step, unet, ema, build_diffusion(config), image_shape)


def training_images(
    run: TrainedRun, data_dir: str | None = None, warn: Callable[[str], None] = warnings.warn
) -> Dataset:
    """The images that a run was trained on, as it saw them."""
    from fastdiff.training.data import load_dataset

    config = run.config
    return load_dataset(
        config.data,
        data_dir or config.data_dir,
        config.image_size,
        config.image_channels,
        warn=warn,
    )


def _described(meta: dict[str, Any], weights: dict[str, Tensor]) -> UNet:
    """Build the U-Net that a checkpoint describes, if the weights beside it are of such a one.

    Whoever wrote the description may have made up its sizes, so nothing of these sizes is
    allocated before they are found in the weights.

    Raises
    ------
    ValueError
        It does not describe a U-Net, or one of other weights, or images that it cannot take.
    """
    from fastdiff.nn import UNet, UNetConfig

    config = UNetConfig.from_dict(meta["unet"])
    mismatch = ValueError("its weights do not fit the U-Net that it describes")
    # Every block has weights of its own; building those that are not there could take for ever.
    if len(config.widths) * config.num_res_blocks > len(weights):
        raise mismatch
    try:
        with torch.device("meta"):
            expected = UNet(config).state_dict()
    except RuntimeError as error:  # a tensor of more than 2**63 elements
        raise mismatch from error
    if {n: t.shape for n, t in expected.items()} != {n: t.shape for n, t in weights.items()}:
        raise mismatch
    shape = meta["image_shape"]
    if not (
        isinstance(shape, list)
        and len(shape) == 3
        and all(type(n) is int and n % config.size_divisor == 0 for n in shape[1:])
        and shape[:2] == [config.in_channels, config.sample_size]
        and shape[2] > 0
    ):
        raise ValueError(f"images of shape {shape} do not fit the U-Net that it describes")
    return UNet(config)
