"""Write docs/reference/command_lines.md from the commands: `python docs/command_lines.py`.

A test compares the page with what this makes.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "reference" / "command_lines.md"

# Module, its positional argument, what it does, and its settings or None for argparse.
COMMANDS = (
    ("fastdiff.train", "", "train, or with `--resume` go on", "training.config.TrainConfig"),
    ("fastdiff.sample", "RUN", "draw images from a run", "sample.SampleConfig"),
    (
        "fastdiff.gallery",
        "RUN",
        "draw the pictures of [the gallery](../gallery.md)",
        "gallery.GalleryConfig",
    ),
    (
        "fastdiff.evaluate",
        "RUN",
        "bound, likelihood, reconstruction, Frechet distance",
        "evaluation.config.EvaluateConfig",
    ),
    ("fastdiff.info", "", "versions, build, devices, backends", None),
    ("fastdiff.verify", "", "compare this machine's kernels with float64", None),
    ("benchmarks", "[OP ...]", "time the ops (from a checkout)", None),
    (
        "benchmarks.ddim_tables",
        "",
        "[DDIM's tables](../ddim_tables.md) in small (from a checkout)",
        None,
    ),
)

INTRODUCTION = """# Command lines

Written by `docs/command_lines.py`. A setting is a flag: `batch_size` is `--batch-size`, one that
is yes or no is `--name` or `--no-name` (those that may also be None take `True` or `False`).
`python -m fastdiff.train --config FILE` reads its settings from YAML, JSON or TOML.

"""

ENDING = """
They end with 0 if all went well, 1 if the run failed on its way, 2 for wrong input (one line on
stderr, nothing written), 130 after Ctrl-C. On a terminal progress is a bar; in a pipe or a log it
is a line every ten seconds.
"""


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION, "| command | does |\n|---|---|\n"]
    for module, argument, does, _ in COMMANDS:
        parts.append(f"| `{f'python -m {module} {argument}'.strip()}` | {does} |\n")
    parts.append(ENDING)
    for module, argument, _, settings in COMMANDS:
        parts.append(f"\n## {module}\n\n")
        if argument == "RUN":
            parts.append("`RUN` is the run's folder, such as `runs/digits`.\n\n")
        rows = _fields(settings) if settings else _arguments(module)
        parts.append("| flag | default | meaning |\n|---|---|---|\n")
        for flag, default, meaning in rows:
            cells = (f"`{flag}`", default, " ".join(meaning.split()).replace("|", "\\|"))
            parts.append(f"| {' | '.join(cells)} |\n")
    return "".join(parts)


def _fields(name: str) -> Iterator[tuple[str, str, str]]:
    """Flags of a dataclass, whose help texts are the strings behind its fields."""
    module, _, kind = f"fastdiff.{name}".rpartition(".")
    settings = getattr(importlib.import_module(module), kind)
    body = ast.parse(textwrap.dedent(inspect.getsource(settings))).body[0].body
    texts = {}
    for field, text in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
            texts[field.target.id] = ast.literal_eval(text.value)
    for field in dataclasses.fields(settings):
        if field.default is dataclasses.MISSING:
            continue  # RUN
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        yield "--" + field.name.replace("_", "-"), f"`{shown}`", texts[field.name]


class _Found(Exception):
    pass


def _arguments(module: str) -> Iterator[tuple[str, str, str]]:
    """Flags of an argparse parser, caught when the command begins to parse."""
    found: list[argparse.ArgumentParser] = []

    def catch(parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        found.append(parser)
        raise _Found

    name = f"{module}.command" if module == "benchmarks" else module
    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", catch),
        contextlib.suppress(_Found),
    ):
        importlib.import_module(name).main([])
    for action in found[0]._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        flag = ", ".join(action.option_strings) or action.metavar or action.dest
        meaning = (action.help or "") % {**vars(action), "prog": module}
        if action.choices:
            choices = ", ".join(map(str, action.choices))
            meaning = f"{meaning}{'; ' if meaning else ''}one of {choices}"
        # What depends on the machine, such as the device, is no default to print.
        plain = isinstance(action.default, int) and not isinstance(action.default, bool)
        yield flag, f"`{action.default}`" if plain else "", meaning


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
