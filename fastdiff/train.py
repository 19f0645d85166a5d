"""``python -m fastdiff.train``: train a U-Net; without any flag, on 8x8 digits in a minute or two.

Writes a run folder with config.json, metrics.jsonl, report.html, loss.png, samples/, checkpoints/
and model/ (diffusers' format). Ctrl-C saves a checkpoint; ``--resume`` continues bit for bit.
``torchrun --nproc-per-node N -m fastdiff.train`` shares every batch out to N processes.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
from typing import Any

from fastdiff import _cli
from fastdiff.training import fit, hub, precision, watchers
from fastdiff.training.config import BUILT_IN_DATA, TrainConfig
from fastdiff.training.config_file import read_config_file
from fastdiff.training.distributed import World
from fastdiff.training.errors import UserError, printable
from fastdiff.training.interrupt import Interrupt

PROGRAM = "python -m fastdiff.train"
NEEDS = ("tyro", "yaml", "tqdm", "safetensors", "PIL", "matplotlib", "sklearn")


def main(argv: list[str]) -> int:
    """Train as ``argv`` says; return the exit code."""
    from fastdiff.training.data import load_dataset
    from fastdiff.training.download import download
    from fastdiff.training.estimate import estimate
    from fastdiff.training.run import RunFolder, choose_device, newest_checkpoint, use_threads
    from fastdiff.training.snapshot import check_data
    from fastdiff.training.trainer import Trainer

    # Everything that can be wrong is found before the first file is written.
    config = parse(argv)
    world = World.from_environment()
    say = _cli.say if world.is_first else _say_nothing
    folder = RunFolder(config.run_folder)
    shown = printable(folder.path)
    quoted = printable(shlex.quote(str(folder.path)))
    device = choose_device(config.device, world)
    precision.say_what_was_chosen(config, device, say)
    use_threads(config)
    watchers.check(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(world.joined(device))
        stack.enter_context(precision.fastest_convolutions(config, device))
        if config.resume:
            # From here on nobody else changes what is in the folder.
            world.first(lambda: stack.enter_context(folder.locked(say)))
        else:
            world.first(folder.check_new)
        if config.download:
            world.first(lambda: download(config.data, config.data_dir))
        if config.resume and _has_gone(config):
            raise UserError(
                f"--resume: the images of {shown} are not in {printable(config.data)} any more; "
                "say with --data where they are now"
            )
        dataset = load_dataset(
            config.data,
            config.data_dir,
            config.image_size,
            config.image_channels,
            warn=say,
        )
        newest = newest_checkpoint(folder, say) if config.resume else None
        if newest is not None:
            check_data(newest, dataset, config.data)
        if not config.resume and world.size == 1:
            config = fit.fit(config, settings_given(argv), dataset, device, say)
        trainer = Trainer(config, dataset, folder, device, world)
        if config.resume:
            if newest is None:
                say(f"{shown} has no checkpoint yet: starting at step 0")
            else:
                trainer.restore(newest)
                say(f"continuing {shown} at step {trainer.step}")
        if not config.resume:
            world.first(lambda: stack.enter_context(folder.locked(say)))
        world.first(lambda: folder.create(config))

        parameters = sum(p.numel() for p in trainer.unet.parameters())
        height, width, channels = dataset.shape
        processes = f"{world.size} processes, each " if world.size > 1 else ""
        say(
            f"{len(dataset):,} image{'s' * (len(dataset) > 1)} of {height}x{width}x{channels}, "
            f"{parameters / 1e6:.2f} M parameters, {processes}on {device}; writing to {shown}"
        )
        expected = estimate(trainer)
        if expected is not None:
            say(str(expected))
        with Interrupt() as interrupt:
            finished = trainer.train(should_stop=interrupt.requested)
    if not finished:
        say(
            f"stopped at step {trainer.step} of {config.steps}; continue with\n"
            f"  {PROGRAM} --out {quoted} --resume"
        )
        # A process that had no signal of its own stops because another had.
        return 128 + (interrupt.signum or signal.SIGTERM)
    say(
        f"done: look at {printable(folder.grid(trainer.step))} (drawn with --ema {config.ema[0]}); "
        f"draw more with\n  python -m fastdiff.sample {quoted}"
    )
    return 0


def parse(argv: list[str]) -> TrainConfig:
    """Settle every setting: flags over ``--config``, over the run being resumed, over defaults.

    Raises
    ------
    UserError
        For a setting that is unknown, of the wrong type or out of range, and for one that would
        make a resumed run another run.
    """
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    early.add_argument("--config")
    early.add_argument("--data")
    early.add_argument("--preset")
    early.add_argument("--device")
    early.add_argument("--steps")
    for switch in ("--exact", "--fsdp"):
        early.add_argument(switch, action=argparse.BooleanOptionalAction)
    # The rest of the line is tyro's; these decide on the defaults it shows.
    try:
        known, _ = early.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from error
    flags = _without(argv, "--config")
    from_file = read_config_file(known.config) if known.config else {}
    source = f"--config {known.config}"

    def settle(base: TrainConfig) -> TrainConfig:
        return _cli.parse(
            TrainConfig,
            flags,
            PROGRAM,
            default=base.updated(from_file, source),
            description=f"{__doc__}\n--config FILE reads any of these from YAML, JSON or TOML.",
        )

    data: Any = known.data or from_file.get("data", TrainConfig.data)
    base = TrainConfig.for_data(str(data))
    if known.preset is not None or "preset" in from_file:
        base = dataclasses.replace(base, channels="preset")
    given = base.updated(from_file, source)
    exact = given.exact if known.exact is None else known.exact
    if not exact:
        steps = known.steps if str(known.steps).isdecimal() else given.steps
        sharded = given.fsdp if known.fsdp is None else known.fsdp
        base = precision.fast(base, known.device or given.device, int(steps), sharded)
    config = settle(base)
    if config.resume:
        from fastdiff.training.run import RunFolder

        folder = config.run_folder
        saved = RunFolder(folder).saved_config("--resume")
        # The folder that was asked for, whatever its config.json says: it may have been moved, or
        # come from somebody else.
        # Asked for now, whatever the run had; else it goes on as it was.
        before = precision.exact(saved) if exact else saved
        config = dataclasses.replace(settle(before), out=str(folder))
        changed = config.changes_that_break_resuming(saved)
        if changed:
            raise UserError(
                f"--resume: {config.run_folder} is a run with other settings: "
                f"{'; '.join(changed)}; leave them out, or train anew with another --out"
            )
    config.validate()
    return config


def settings_given(argv: list[str]) -> set[str]:
    """The names of settings that stand on the command line or in the file of --config."""
    flags = {argument.partition("=")[0] for argument in argv}
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    given = {name for name in names if f"--{name.replace('_', '-')}" in flags}
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config")
    path = early.parse_known_args(argv)[0].config
    return given | set(read_config_file(path) if path else {})


def _has_gone(config: TrainConfig) -> bool:
    """Whether the data are a path, at which nothing is."""
    is_path = config.data not in BUILT_IN_DATA and not config.data.startswith(hub.PREFIX)
    return is_path and not os.path.exists(config.data)


def _say_nothing(message: str) -> None:
    """What rank 0 says, the other processes need not repeat."""


def _without(argv: list[str], flag: str) -> list[str]:
    """Return ``argv`` without ``flag VALUE`` and ``flag=VALUE``."""
    kept, rest = [], iter(argv)
    for argument in rest:
        if argument == flag:
            next(rest, None)
        elif not argument.startswith(flag + "="):
            kept.append(argument)
    return kept


if __name__ == "__main__":
    _cli.run(PROGRAM, main, NEEDS)
