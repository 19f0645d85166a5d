"""Snippets are run and links followed: in docstrings, the README and docs/."""

from __future__ import annotations

import doctest
import importlib
import operator
import pathlib
import pkgutil
import re

import pytest

import fastdiff
from fastdiff.samplers import Sampler

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/*.md")),
]


def _modules() -> list[str]:
    """All modules of the package but the command lines and the Triton kernels."""
    found = pkgutil.walk_packages(fastdiff.__path__, "fastdiff.")
    return [m.name for m in found if "_C_" not in m.name and "triton_kernels" not in m.name]


@pytest.mark.parametrize("name", _modules())
def test_docstring_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0


def _is_sampler(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Sampler) and thing is not Sampler


PUBLIC = [
    *(f"ops.{name}" for name in fastdiff.ops.__all__),
    *(f"samplers.{name}" for name, thing in vars(fastdiff.samplers).items() if _is_sampler(thing)),
    "GaussianDiffusion",
    "NoiseSchedule",
    "UNet",
]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_docstrings_have_an_example(name: str) -> None:
    thing = operator.attrgetter(name)(fastdiff)
    assert doctest.DocTestParser().get_examples(thing.__doc__)


def test_readme_python() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
        assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_backticks_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in re.findall(
        r"`((?:csrc|fastdiff|tests|triton_kernels|benchmarks|docs)/[\w./]+)`", text
    ):
        assert (ROOT / name).exists(), f"{page} names {name}"
