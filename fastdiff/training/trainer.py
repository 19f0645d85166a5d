"""The training loop: one file, read from top to bottom."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff._progress import progress
from fastdiff.training import checkpoint as checkpoints
from fastdiff.training import (
    endings,
    finite,
    grids,
    optimization,
    posthoc_ema,
    report,
    shards,
    snapshot,
)
from fastdiff.training.checkpoint import Checkpoint
from fastdiff.training.data import Batches
from fastdiff.training.errors import NotFiniteError, RunError, printable_lines
from fastdiff.training.logging import Metrics, memory_mib
from fastdiff.training.run import newest_checkpoint
from fastdiff.training.state import TrainState


class Trainer(TrainState):
    """Trains a U-Net to denoise: L_simple (DDPM eq. 14, Math §6) by default.

    Everything random about a training image (its timestep, its noise, whether it is mirrored or
    loses its label, its masks of dropout) is a function of the run's seed and of how many images
    came before it in the run. So it depends neither on how a batch is split, nor on when the run
    was interrupted, nor on how many processes share the work.

    Parameters as `TrainState` has them; the folder must exist by the time `train` is called.
    """

    def train(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Run until the last step, or until ``should_stop()`` after some step.

        When a loss or gradient is not finite, the run goes back to its last checkpoint and repeats
        the steps since, which heals a passing fault; at the second time it stops. (With --amp fp16
        a gradient that overflows is part of finding the loss scale, as long as that can shrink.)

        Returns
        -------
        bool
            Whether the last step was reached. Either way a checkpoint of the last step is saved.

        Raises
        ------
        RunError
            The loss is not finite and stays so, a process is lost, or the run folder cannot be
            written to.
        UserError
            Another process trains in the run folder.
        """
        self.saved = self.step or None
        self._problem = ""
        with contextlib.ExitStack() as stack:
            # Held already where the command line restores a checkpoint.
            self.world.first(lambda: stack.enter_context(self.folder.locked(self._say)))
            stack.enter_context(endings.telling(self))
            finished = self._train_and_repeat(should_stop)
            if finished and self._problem:
                raise RunError(self._problem)
            return finished

    def _train_and_repeat(self, should_stop: Callable[[], bool]) -> bool:
        failed = 0
        while True:
            try:
                return self._train(should_stop)
            except NotFiniteError as error:
                if self.saved is None or error.step <= failed:
                    raise
                failed = error.step
                self._go_back(error)

    def _go_back(self, error: NotFiniteError) -> None:
        """Restore the last checkpoint."""
        with self.world.peers():
            self.world.any(False)  # nobody reads what rank 0 is still writing
        newest = newest_checkpoint(self.folder, self._say)
        if newest is None:
            raise RunError(f"{error}; {self.folder.checkpoints} has gone") from error
        self.meter.clear()
        self.restore(newest)
        self.saved = self.step
        self._say(f"{error}; going back to step {self.step} to repeat those steps once")

    def _train(self, should_stop: Callable[[], bool]) -> bool:
        config = self.config
        batches = iter(
            Batches(
                self.dataset,
                config.batch_size,
                config.seed,
                self.step * config.batch_size,
                part=slice(self.world.rank * self.share, (self.world.rank + 1) * self.share),
                device=self.device,
            )
        )
        bar = progress(
            config.steps,
            "step",
            initial=self.step,
            show=self.world.is_first,
            dynamic_ncols=True,
        )
        closing = contextlib.ExitStack()
        closing.callback(batches.close)
        with bar, closing, endings.writing(self), self.world.peers():
            if self.world.is_first:
                self.folder.tidy(self.saved, config.keep)
                self.metrics = closing.enter_context(
                    Metrics.of_run(config, self.folder, self.step, self._say, self.known_metrics)
                )
            self._draw_what_is_missing()
            self._restart_clock()
            while self.step < config.steps and not self.world.any(should_stop()):
                images, labels = endings.next_batch(batches, self.step + 1)
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
                    self.saved = self.step
                    self._restart_clock()
                if self.step % config.sample_every == 0:
                    self._flush()
                    self.save_samples()
                    self._restart_clock()
            if self.step < config.steps:
                # A log entry that is not full yet goes on with the run.
                self._checked_meter()
            else:
                self._flush()
            if self.saved != self.step:
                self.save_checkpoint()
                self.saved = self.step
            if self.step < config.steps:
                return False
            self.save_samples()
            snapshot.save_model(self)
            return True

    def _train_step(self, images: Tensor, labels: Tensor | None) -> None:
        """One optimizer step on this process's share of a batch, uint8 (B, H, W, C)."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        seen = self.step * config.batch_size + self.world.rank * self.share
        size = self.share // config.grad_accum
        loss = torch.zeros((), device=self.device)
        drawn: list[tuple[Tensor, Tensor]] = []
        self_condition = config.self_conditioning and self._coin(self.seed_condition)
        if self.half is not None:
            self.half.refresh()
        for start in range(0, self.share, size):
            part = slice(start, start + size)
            x0 = self._to_device(images[part]).permute(0, 3, 1, 2)
            if not config.channels_last:
                x0 = x0.contiguous()
            flip = None
            if config.flip:
                flip = self._uniform(self.seed_flip, size, seen + start) < 0.5
            t, weight = self.timesteps.sample(size, self._keys(self.seed_t, size, seen + start))
            model_kwargs = {}
            if self.unet.config.dropout:
                model_kwargs["dropout_keys"] = self._keys(self.seed_dropout, size, seen + start)
            if config.class_cond:
                y = self._to_device(labels[part])
                hidden = self._uniform(self.seed_label, size, seen + start) < config.label_dropout
                model_kwargs["y"] = y.masked_fill(hidden, self.unet.config.num_classes)
            with self.world.averaging(self.net, now=start + size == self.share):
                losses = self.diffusion.training_losses(
                    self._predict,
                    x0,
                    t,
                    seed=self._keys(self.seed_noise, size, seen + start),
                    model_kwargs=model_kwargs,
                    flip=flip,
                    self_condition=self_condition,
                )
                part_loss = (weight * losses["loss"]).sum() / self.share
                (part_loss * self.scaler.scale).backward()
            if self.half is not None:
                self.half.collect()
            loss += part_loss.detach()
            drawn.append((t, losses["loss"].detach()))
        if self.sharded:
            shards.move_gradients(list(self.unet.parameters()), self.parameters)
        scale = self.scaler.scale.clone()
        self.scaler.unscale(self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = shards.norm(gradients, self.sharded)
        torch.nn.utils.clip_grads_with_norm_(self.parameters, config.grad_clip, norm)
        finite = norm.isfinite()
        # The fused kernels leave the weights alone when this is 1: decided without a wait.
        self.optimizer.found_inf = (~finite).float()
        self.optimizer.step()
        self.scaler.update(finite)
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update()
        # After the whole batch: how it is split must not change what is drawn in it.
        t, losses = map(torch.cat, zip(*drawn, strict=True))
        self.timesteps.update(t, losses, largest=self.share)
        self.meter.add(loss, norm, scale, t, losses)
        self.step += 1

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step (from 0)."""
        return optimization.learning_rate(self.config, step)

    def save_samples(self) -> None:
        """Draw the grid of this step from the averaged weights: always from the same noise."""
        grid, bad = grids.draw(self)
        self._problem = ""
        if grid is None and self.world.is_first:
            self._problem = (
                f"step {self.step}: {bad} of {self.config.num_samples} samples have pixels that "
                "are not finite: their picture was not written (a lower --lr may help)"
            )
            if self.step < self.config.steps:
                self._say(self._problem)
        if self.world.is_first:
            if grid is not None:
                self.metrics.save_grid(grid, self.folder.grid(self.step), self.step)
            self._report()

    def _report(self) -> None:
        self.metrics.plot(self.folder.path / "loss.png")
        report.write(self.folder, self._say)

    def _draw_what_is_missing(self) -> None:
        """Draw the grid that a run which was killed after its checkpoint had no time for."""
        if self.saved in (None, self.config.steps) or self.saved % self.config.sample_every:
            return
        first = self.world.is_first
        if self.world.any(first and not grids.is_whole(self.folder.grid(self.step))):
            self.save_samples()
        elif first:
            self._report()

    def save_checkpoint(self) -> None:
        """Write everything that `restore` needs."""
        taken = snapshot.take(self)
        for weights in (taken.model, *taken.emas):
            finite.check_weights(self.step, weights.values())
        if self.world.is_first:
            checkpoints.save(self.folder.checkpoints, taken, self.config.keep)
            self._save_snapshot(taken.emas[len(self.config.ema) :])

    def _save_snapshot(self, averages: list[dict[str, Tensor]]) -> None:
        """Keep the averages of --posthoc-ema, at every so many checkpoints."""
        config = self.config
        every = posthoc_ema.interval(config.steps, config.checkpoint_every)
        if averages and self.step % every == 0:
            posthoc_ema.save(self.folder.averages, self.step, averages)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Continue from ``checkpoint``, bit for bit as if the run had never stopped.

        Raises
        ------
        UserError
            The checkpoint is of other settings, another model or other data.
        """
        snapshot.restore(self, checkpoint)

    def _predict(self, x_t: Tensor, t: Tensor, **kwargs: Tensor) -> Tensor:
        with self.autocast():
            return self.net(x_t, t, **kwargs).float()

    def _keys(self, seed: int, num: int, first: int) -> Tensor:
        return ops.sample_keys(seed, num, offset=first, device=self.device)

    def _uniform(self, seed: int, num: int, first: int) -> Tensor:
        """Uniform numbers in [0, 1), from the low 24 bits of the samples' keys."""
        return (self._keys(seed, num, first) & 0xFFFFFF).float() * 2.0**-24

    def _coin(self, seed: int) -> bool:
        """Heads or tails of this step, on the host: nothing waits for it."""
        return np.random.default_rng((seed % 2**63, self.step)).random() < 0.5

    def _to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device, non_blocking=True)  # from the memory that `Batches` pinned

    def _restart_clock(self) -> None:
        """Leave out of the throughput what was done since the last flush."""
        self._clock, self._clock_step = time.perf_counter(), self.step

    def _flush(self) -> str:
        """Read the pending losses (the only wait for the device), check and log them."""
        if not self.meter.steps:
            return ""
        rows, loss_by_timestep = self._checked_meter()
        self.meter.clear()
        since, steps = self._clock, self.step - self._clock_step
        self._restart_clock()
        rate = steps * self.config.batch_size / (self._clock - since)
        # With --amp fp16 some may have overflowed.
        norms = [norm for _, norm, _ in rows if math.isfinite(norm)]
        loss = sum(row[0] for row in rows) / len(rows)
        if not self.world.is_first:
            return ""
        self.metrics.write(
            step=self.step,
            loss=loss,
            grad_norm=sum(norms) / len(norms) if norms else None,
            lr=self.learning_rate(self.step - 1),
            images_per_second=round(rate, 1),
            memory_mib=memory_mib(self.device),
            loss_by_timestep=loss_by_timestep,
            **({"loss_scale": rows[-1][2]} if self.scaler.enabled else {}),
        )
        return f"loss {loss:.4f}, {rate:,.0f} images/s"

    def _checked_meter(self) -> tuple[list[list[float]], list[float | None]]:
        """What the meter holds; `NotFiniteError` if a loss or gradient there is not finite."""
        rows, loss_by_timestep = self.meter.peek(self.world)
        for step, (loss, norm, scale) in enumerate(rows, self.step - len(rows) + 1):
            finite.check_step(step, loss, norm, scale, self.scaler.enabled)
        return rows, loss_by_timestep

    def _say(self, message: str) -> None:
        from tqdm import tqdm

        if self.world.is_first:
            tqdm.write(printable_lines(message), file=sys.stderr)  # above the progress bar
