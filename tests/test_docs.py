"""Snippets are run and links followed: in docstrings, the README and docs/."""

from __future__ import annotations

import doctest
import importlib
import operator
import pathlib
import pkgutil
import re
import runpy

import pytest

import fastdiff
from fastdiff.samplers import Sampler

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]


def python_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


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


@pytest.mark.parametrize("block", python_blocks("README.md"))
def test_readme_python(block: str) -> None:
    exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("page", [p for p in PAGES if p != "README.md" and python_blocks(p)])
def test_python_of_pages(
    page: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of a page in order, each knowing the names of those before it."""
    blocks = python_blocks(page)
    if any(re.search(r"^from diffusers import", block, re.MULTILINE) for block in blocks):
        pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    # From a file, since fastdiff.patch and torch.compile read the source of classes.
    (tmp_path / "page.py").write_text("\n".join(blocks))
    runpy.run_path(str(tmp_path / "page.py"))


def test_every_public_name_is_in_the_reference() -> None:
    pages = "".join(p.read_text() for p in ROOT.glob("docs/reference/*.md"))
    documented = {
        name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    }
    rooms = (fastdiff, fastdiff.ops, fastdiff.samplers, fastdiff.nn)
    public = {name for room in rooms for name in room.__all__ if not name.isupper()}
    rooms_and_facts = {"ops", "samplers", "guidance", "reference", "__version__"}
    assert documented >= public - rooms_and_facts


def test_the_page_of_command_lines_is_what_its_script_writes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))  # benchmarks/ is not installed
    script = runpy.run_path(str(ROOT / "docs/command_lines.py"))
    assert script["page"]() == script["PAGE"].read_text(), "run: python docs/command_lines.py"


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
