"""The training loop: one file, read from top to bottom."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.images import image_grid, to_uint8
from fastdiff.timestep_samplers import timestep_sampler
from fastdiff.training import checkpoint as checkpoints
from fastdiff.training.checkpoint import Checkpoint
from fastdiff.training.config import TrainConfig
from fastdiff.training.data import Batches, Dataset
from fastdiff.training.ema import EMA
from fastdiff.training.errors import RunError, UserError
from fastdiff.training.logging import Metrics
from fastdiff.training.run import RunFolder, build_diffusion, build_unet


class Trainer:
    """Trains a U-Net to denoise: L_simple (DDPM eq. 14, SPEC §6) by default.

    Everything random about a training image (its timestep, its noise, whether it is mirrored or
    loses its label) is a function of the run's seed and of how many images came before it in the
    run. So it depends neither on how a batch is split, nor on when the run was interrupted, nor
    on how many devices share the work.

    Parameters
    ----------
    config : TrainConfig
        Validated settings.
    dataset : Dataset
        What to learn.
    folder : RunFolder
        Where to write; it must exist by the time `train` is called.
    device : torch.device
        Where to compute.
    """

    def __init__(
        self, config: TrainConfig, dataset: Dataset, folder: RunFolder, device: torch.device
    ) -> None:
        self.config = config
        self.dataset = dataset
        self.folder = folder
        self.device = device
        self.step = 0

        torch.manual_seed(config.seed)  # weights and dropout
        keys = ops.sample_keys(config.seed, 5).tolist()
        self._seed_noise, self._seed_t, self._seed_label, self._seed_flip, self._seed_grid = keys

        self.diffusion = build_diffusion(config)
        self.timesteps = timestep_sampler(config.timestep_sampler, config.timesteps, device)
        self.unet = build_unet(config, dataset.shape, dataset.num_classes).to(device)
        if config.channels_last:
            self.unet.to(memory_format=torch.channels_last)
        self.net = torch.compile(self.unet) if config.compile else self.unet
        self.ema = EMA(self.unet, config.ema)
        self.parameters = list(self.unet.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        # Loss and gradient norm of every step since the last flush, read all at once.
        self._pending = torch.zeros(config.log_every, 2, device=device)
        self._num_pending = 0

    def train(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Run until the last step, or until ``should_stop()`` after some step.

        Returns
        -------
        bool
            Whether the last step was reached. Either way a checkpoint of the last step is saved.

        Raises
        ------
        RunError
            The loss is not finite, or the run folder cannot be written to.
        """
        from tqdm import tqdm

        config = self.config
        batches = iter(
            Batches(self.dataset, config.batch_size, config.seed, self.step * config.batch_size)
        )
        bar = tqdm(total=config.steps, initial=self.step, unit="step", dynamic_ncols=True)
        saved = self.step if self.step else None
        try:
            with bar, contextlib.closing(batches), self._writing():
                self.metrics = Metrics(self.folder.path / "metrics.jsonl", last_step=self.step)
                self._restart_clock()
                while self.step < config.steps and not should_stop():
                    images, labels = next(batches)
                    self._train_step(images, labels)
                    bar.update()

                    if self.step % config.log_every == 0:
                        bar.set_postfix_str(self._flush())
                    if self.step == config.steps:
                        break
                    # The checkpoint first: then samples, which may take long, can be cut short.
                    if self.step % config.checkpoint_every == 0:
                        self._flush()
                        self.save_checkpoint()
                        saved = self.step
                        self._restart_clock()
                    if self.step % config.sample_every == 0:
                        self._flush()
                        self.save_samples()
                        self._restart_clock()
                self._flush()
                if saved != self.step:
                    self.save_checkpoint()
                if self.step < config.steps:
                    return False
                self.save_samples()
                self.save_model()
                return True
        except RunError as error:
            raise RunError(f"{error}; {self._what_is_left(saved)}") from error

    def _train_step(self, images: Tensor, labels: Tensor | None) -> None:
        """One optimizer step on uint8 images (B, H, W, C)."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        seen = self.step * config.batch_size
        size = config.batch_size // config.grad_accum
        loss = torch.zeros((), device=self.device)
        drawn: list[tuple[Tensor, Tensor]] = []
        for start in range(0, config.batch_size, size):
            part = slice(start, start + size)
            x0 = self._to_device(images[part]).permute(0, 3, 1, 2)
            if not config.channels_last:
                x0 = x0.contiguous()
            flip = None
            if config.flip:
                flip = self._uniform(self._seed_flip, size, seen + start) < 0.5
            t, weight = self.timesteps.sample(size, self._keys(self._seed_t, size, seen + start))
            model_kwargs = {}
            if config.class_cond:
                y = self._to_device(labels[part])
                hidden = self._uniform(self._seed_label, size, seen + start) < config.label_dropout
                model_kwargs["y"] = y.masked_fill(hidden, self.unet.config.num_classes)
            losses = self.diffusion.training_losses(
                self._predict,
                x0,
                t,
                seed=self._keys(self._seed_noise, size, seen + start),
                model_kwargs=model_kwargs,
                flip=flip,
            )
            part_loss = (weight * losses["loss"]).sum() / config.batch_size
            part_loss.backward()
            loss += part_loss.detach()
            drawn.append((t, losses["loss"].detach()))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        # After the whole batch: how it is split must not change what is drawn in it.
        self.timesteps.update(*map(torch.cat, zip(*drawn, strict=True)))
        self._pending[self._num_pending] = torch.stack((loss, norm))
        self._num_pending += 1
        self.step += 1

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then constant or a cosine down to zero at the last step."""
        config = self.config
        if step < config.warmup:
            return config.lr * (step + 1) / config.warmup
        if config.lr_schedule == "constant":
            return config.lr
        progress = (step - config.warmup) / max(1, config.steps - config.warmup)
        return config.lr * (1 + math.cos(math.pi * min(1.0, progress))) / 2

    def save_samples(self) -> None:
        """Draw the grid of this step from the averaged weights: always from the same noise."""
        from fastdiff.samplers import DDIM

        config = self.config
        height, width, channels = self.dataset.shape
        sampler = DDIM(self.diffusion, steps=config.sample_steps)
        keys = self._keys(self._seed_grid, config.num_samples, 0)
        parts = []
        # No more at a time than are trained on at a time: what fits in memory there fits here.
        for indices in torch.arange(config.num_samples).split(
            config.batch_size // config.grad_accum
        ):
            indices = indices.to(self.device)
            model_kwargs = {}
            if config.class_cond:
                model_kwargs["y"] = indices % self.unet.config.num_classes
            images = sampler.sample(
                self._predict_averaged,
                (len(indices), channels, height, width),
                seed=keys[indices],
                model_kwargs=model_kwargs,
                progress=False,
            )
            parts.append(to_uint8(images))
        image_grid(torch.cat(parts)).save(self.folder.samples / f"step-{self.step:08d}.png")
        self.metrics.plot(self.folder.path / "loss.png")

    def save_checkpoint(self) -> None:
        """Write everything that `restore` needs."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint = Checkpoint(
            step=self.step,
            meta=self._facts(),
            model=self.unet.state_dict(),
            ema=self.ema.model.state_dict(),
            state={
                "optimizer": self.optimizer.state_dict(),
                "ema_updates": self.ema.num_updates,
                "samples_seen": self.step * self.config.batch_size,
                "timesteps": self.timesteps.state_dict(),
                "random": random,
            },
        )
        checkpoints.save(self.folder.checkpoints, checkpoint, self.config.keep)

    def _facts(self) -> dict[str, Any]:
        """What a checkpoint says about the run, and must find when it is restored."""
        height, width, channels = self.dataset.shape
        return {
            "settings": self.config.identity(),
            "unet": self.unet.config.to_dict(),
            "image_shape": [channels, height, width],
            "num_images": len(self.dataset),
            "classes": list(self.dataset.classes),
        }

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``, bit for bit as if the run had never stopped.

        Raises
        ------
        UserError
            The checkpoint is of other settings, another model or other data.
        """
        # As JSON would give them back, tuples as lists.
        here = json.loads(json.dumps(self._facts()))
        there = {name: checkpoint.meta.get(name) for name in here}
        if there != here:
            raise UserError(
                f"--resume: the checkpoint in {self.folder.path} is of another run: "
                f"{'; '.join(_differences(there, here))}; train anew with another --out"
            )
        self.step = checkpoint.step
        self.unet.load_state_dict(checkpoint.model)
        self.ema.model.load_state_dict(checkpoint.ema)
        self.ema.num_updates = checkpoint.state["ema_updates"]
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        self.timesteps.load_state_dict(checkpoint.state["timesteps"])
        torch.set_rng_state(checkpoint.state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in checkpoint.state["random"]:
            torch.cuda.set_rng_state(checkpoint.state["random"]["cuda"], self.device)

    def save_model(self) -> None:
        """Write model/, the averaged weights in diffusers' format, where that can express them."""
        from fastdiff.nn import diffusers_format

        try:
            scheduler = diffusers_format.ddpm_scheduler_config(
                self.diffusion.schedule.betas, self.config.prediction, self.config.variance
            )
            # Beside the old one first, so that there is a whole model/ at any moment but one.
            fresh = self.folder.path / ".tmp-model"
            diffusers_format.save_pretrained(self.ema.model, fresh, scheduler)
        except diffusers_format.UnsupportedByDiffusersError as error:
            self._say(f"model/ in diffusers' format was not written: {error}")
            return
        if self.folder.model.exists():
            shutil.rmtree(self.folder.model)
        fresh.rename(self.folder.model)

    def _predict(self, x_t: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with self._autocast():
            return self.net(x_t, t, **kwargs).float()

    def _predict_averaged(self, x_t: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with self._autocast():
            return self.ema.model(x_t, t, **kwargs).float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16")

    def _keys(self, seed: int, num: int, first: int) -> Tensor:
        return ops.sample_keys(seed, num, offset=first, device=self.device)

    def _uniform(self, seed: int, num: int, first: int) -> Tensor:
        """Uniform numbers in [0, 1), from the low 24 bits of the samples' keys."""
        return (self._keys(seed, num, first) & 0xFFFFFF).float() * 2.0**-24

    @staticmethod
    def _say(message: str) -> None:
        from tqdm import tqdm

        tqdm.write(message, file=sys.stderr)  # above the progress bar

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _restart_clock(self) -> None:
        """Leave out of the throughput what was done since the last flush."""
        self._clock = time.perf_counter()

    def _flush(self) -> str:
        """Read the pending losses (the only wait for the device), check and log them."""
        if not self._num_pending:
            return ""
        rows = self._pending[: self._num_pending].tolist()
        self._num_pending = 0
        first = self.step - len(rows) + 1
        for step, (loss, norm) in enumerate(rows, first):
            for name, value in (("loss", loss), ("norm of the gradient", norm)):
                if not math.isfinite(value):
                    raise RunError(
                        f"step {step}: the {name} is {value} (a lower --lr or --grad-clip may help)"
                    )
        now = time.perf_counter()
        rate = len(rows) * self.config.batch_size / (now - self._clock)
        self._clock = now
        loss, norm = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        self.metrics.write(
            step=self.step,
            loss=loss,
            grad_norm=norm,
            lr=self.learning_rate(self.step - 1),
            images_per_second=round(rate, 1),
        )
        return f"loss {loss:.4f}, {rate:,.0f} images/s"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the disk (full, read-only) into one that says at which step."""
        from safetensors import SafetensorError

        try:
            yield
        except OSError as error:
            where = error.filename or self.folder.path
            raise RunError(f"step {self.step}: cannot write {where}: {error.strerror}") from error
        except SafetensorError as error:
            raise RunError(f"step {self.step}: cannot write the model: {error}") from error

    def _what_is_left(self, saved: int | None) -> str:
        if saved is None:
            return "no checkpoint had been written yet"
        return (
            f"the checkpoint of step {saved} is intact, continue from it with "
            f"--out {self.folder.path} --resume"
        )


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Describe the fields in which two nested dicts differ, and nothing else of them."""
    lines = []
    for name in here | there:
        theirs, ours = there.get(name), here.get(name)
        if isinstance(theirs, dict) and isinstance(ours, dict):
            lines += [f"{name}.{line}" for line in _differences(theirs, ours)]
        elif isinstance(theirs, dict) or isinstance(ours, dict):
            lines.append(f"it has no {name}" if theirs is None else f"its {name} differs")
        elif theirs != ours:
            lines.append(f"{name} is {theirs}, not {ours}")
    return lines
