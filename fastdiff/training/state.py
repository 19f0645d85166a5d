"""What a run is made of: networks, optimizer, counters, and where it stands."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff import ops
from fastdiff.diffusion.timestep_samplers import timestep_sampler
from fastdiff.nn import UNet
from fastdiff.training import optimization, posthoc_ema, shards
from fastdiff.training.compiling import compiled
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Dataset
from fastdiff.training.distributed import World
from fastdiff.training.ema import EMA
from fastdiff.training.errors import UserError
from fastdiff.training.half_weights import HalfWeights
from fastdiff.training.logging import Metrics
from fastdiff.training.meter import Meter
from fastdiff.training.posthoc_ema import PowerEMA
from fastdiff.training.run import RunFolder, build_diffusion, build_unet


class TrainState:
    """A run at some step: what the loop changes, checkpoints keep and grids are drawn from.

    Parameters
    ----------
    config : TrainConfig
        Validated settings.
    dataset : Dataset
        What to learn.
    folder : RunFolder
        Where to write.
    device : torch.device
        Where to compute.
    world : World
        The processes that share the work; default: this one alone.
    """

    def __init__(
        self,
        config: TrainConfig,
        dataset: Dataset,
        folder: RunFolder,
        device: torch.device,
        world: World = World(),  # noqa: B008 (frozen)
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.folder = folder
        self.device = device
        self.world = world
        self.step = 0
        self.share = _share(config, world)

        torch.manual_seed(config.seed)  # weights
        keys = ops.sample_keys(config.seed, 7).tolist()
        self.seed_noise, self.seed_t, self.seed_label, self.seed_flip, *rest = keys
        self.seed_grid, self.seed_condition, self.seed_dropout = rest

        self.diffusion = build_diffusion(config)
        self.timesteps = timestep_sampler(config.timestep_sampler, config.timesteps, device)
        self.unet = build_unet(config, dataset.shape, dataset.num_classes).to(device)
        self.sharded = config.fsdp and world.size > 1
        if config.exact or self.sharded:
            self.unet.set_merged(False)
        # FSDP shards contiguous weights only; activations follow the images' format.
        if config.channels_last and not self.sharded:
            self.unet.to(memory_format=torch.channels_last)
        self.emas = [EMA(self.unet, decay) for decay in config.ema]
        if config.posthoc_ema:
            self.emas += [PowerEMA(self.unet, length) for length in posthoc_ema.LENGTHS]
        self.half = self._half_weights()
        if self.sharded:
            for module in (self.unet, *(ema.model for ema in self.emas)):
                shards.shard(module, device)
            self.net = self.unet
        else:
            network = self.unet if self.half is None else self.half.module
            if config.compile:
                network = compiled(network, regional=world.size > 1 and device.type == "cuda")
            self.net = world.data_parallel(network)
        # What the optimizer works on: with --fsdp, this process's parts.
        self.parameters = shards.local(self.unet.parameters())
        self.optimizer = optimization.optimizer(config, self.parameters)
        self.scaler = optimization.LossScaler(device, enabled=config.amp == "fp16")
        self.meter = Meter(device, min(config.log_every, config.steps), config.timesteps)
        self.metrics: Metrics | None = None  # of rank 0, while it trains
        self.known_metrics: dict[str, Any] | None = None  # by the checkpoint that was restored
        self.saved: int | None = None  # the step of the last checkpoint

    def _half_weights(self) -> HalfWeights | None:
        """On a GPU under autocast; with parts of a batch in several processes the gradients that
        are averaged in the end would be added up in half precision."""
        alone = self.world.size == 1 or self.config.grad_accum == 1
        if self.device.type != "cuda" or self.config.amp == "off" or self.sharded or not alone:
            return None
        return HalfWeights(self.unet, self.half_precision)

    @property
    def half_precision(self) -> torch.dtype:
        """What --amp computes in."""
        return torch.float16 if self.config.amp == "fp16" else torch.bfloat16

    def averaged(self) -> UNet:
        """The U-Net with the first average of the weights, whole; all processes must call it."""
        averaged = self.emas[0].model
        return shards.whole(averaged, self.device) if self.sharded else averaged

    def autocast(self) -> torch.autocast:
        """Context of a forward pass: the precision that --amp asks for."""
        enabled = self.config.amp != "off"
        return torch.autocast(self.device.type, self.half_precision, enabled=enabled)


def _share(config: TrainConfig, world: World) -> int:
    """How many images of each batch a process takes."""
    parts = world.size * config.grad_accum
    if config.batch_size % parts:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be shared equally by {world.size} processes "
            f"with --grad-accum {config.grad_accum}: give a multiple of {parts}"
        )
    return config.batch_size // world.size
