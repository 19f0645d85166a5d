"""Every command in the README and the pages is one that exists: module, flags, tests, extras."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import pathlib
import re
import shlex
import sys

import pytest

from fastdiff import _cli

ROOT = pathlib.Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md")),
]
PAGES.sort()
VARIABLES = {"TRITON_INTERPRET", *re.findall(r"`([A-Z_]+)(?:=1)?`", README)}


def commands(page: str) -> list[str]:
    """The commands of a page's shell blocks, one each."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    uncommented = (re.sub(r"(^|\s+)#.*", "", line) for line in lines)
    return [c.strip() for line in uncommented for c in line.split("&&") if c.strip()]


@pytest.mark.parametrize("command", sorted({c for page in PAGES for c in commands(page)}))
def test_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        assert words.pop(0).partition("=")[0] in VARIABLES
    match words:
        case ["python", "-m", module, *arguments]:
            _check_program(module, arguments, monkeypatch)
        case ["torchrun", "--nproc-per-node", number, "-m", module, *arguments]:
            assert number.isdigit()
            _check_program(module, arguments, monkeypatch)
        case ["pytest", *arguments]:
            _check_pytest(arguments)
        case ["pip", "install", *arguments]:
            _check_pip([a for a in arguments if a not in ("-e", "--no-build-isolation")])
        case ["pip", "wheel", "--no-deps", "-w", _, *arguments]:
            _check_pip(arguments)
        case ["mkdocs", "build" | "serve", *arguments]:
            assert set(arguments) <= {"--strict"}
            assert (ROOT / "mkdocs.yml").exists()
        case ["pre-commit", "install"]:
            assert (ROOT / ".pre-commit-config.yaml").exists()
        case (
            ["python", "setup.py", "build_ext", "--inplace"]
            | [".ci/run"]
            | ["tests/sanitize.sh"]
            | ["tests/on_gpu.sh"]
        ):
            assert (ROOT / (words[1] if words[0] == "python" else words[0])).exists()
        case _:
            pytest.fail(f"not a command that this test knows: {command}")


class Parsed(Exception):
    """The arguments were understood; what would come next does not run."""


def _check_program(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a module's main until it has understood its arguments."""

    def parse_and_stop(parse):
        def parsed(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return parsed

    monkeypatch.setattr(_cli, "parse", parse_and_stop(_cli.parse))
    parse_args = parse_and_stop(argparse.ArgumentParser.parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.syspath_prepend(str(ROOT))  # benchmarks/ is not installed
    if importlib.util.find_spec(module).submodule_search_locations:
        module += ".__main__"
    main = getattr(importlib.import_module(module), "main", None)
    if main is None:  # a package whose __main__ only calls another module
        return
    with pytest.raises(Parsed):
        main(*[arguments] if inspect.signature(main).parameters else [])


def _check_pytest(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for flag in ("-n", "-k", "-m"):
        parser.add_argument(flag)
    parser.add_argument("paths", nargs="*")
    options = parser.parse_args(arguments)
    settings = (ROOT / "pyproject.toml").read_text()
    if options.m:
        assert re.search(rf'^    "{options.m}: ', settings, re.MULTILINE)
    names = []
    for path in (ROOT / p for p in options.paths):
        assert path.exists()
        for file in path.rglob("*.py") if path.is_dir() else [path]:
            names += re.findall(r"def (test_\w+)", file.read_text())
    for wanted in (options.k or "test_").split(" or "):
        assert not options.paths or any(wanted in name for name in names), wanted


def _check_pip(arguments: list[str]) -> None:
    settings = (ROOT / "pyproject.toml").read_text()
    for argument in arguments:
        if extras := re.fullmatch(r"\.\[(\w+)\]", argument):
            assert re.search(rf"^{extras[1]} = \[", settings, re.MULTILINE)
        else:
            assert argument == "." or f'"{argument}"' in settings


@pytest.mark.parametrize("page", PAGES)
def test_modules_named_in_the_text_exist(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    for module in re.findall(r"`(?:python|torchrun[^`]*?) -m ([\w.]+)", (ROOT / page).read_text()):
        assert importlib.util.find_spec(module), module
