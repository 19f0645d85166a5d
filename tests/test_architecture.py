"""What the folders promise: no import circles, and every name that the documentation speaks of."""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = {"fastdiff": PROJECT / "fastdiff", "fastdiff.triton_kernels": PROJECT / "triton_kernels"}


def modules() -> dict[str, Path]:
    """Every module of the package, by name; packages by theirs."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "fastdiff" and parts[0] == "triton_kernels":  # a link in some checkouts
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join((package, *parts))] = path
    return found


def imports(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """What a module imports anywhere in it: at the top, in functions, under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.stem == "__init__" else module.split(".")[:-1]
                package = package[: len(package) - node.level + 1]
                base = ".".join((*package, base)) if base else ".".join(package)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.add(name if name in known else base)
    return (found & known.keys()) - {module}


def test_no_import_circles() -> None:
    known = modules()
    assert len(known) > 100
    graph = {module: imports(module, path, known) for module, path in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"import circle: {' <- '.join(error.args[1])}")


def documented_names() -> set[str]:
    """Dotted names in backticks and in mkdocstrings directives, of pages, README and docstrings."""
    pages = [PROJECT / "README.md", PROJECT / "CONTRIBUTING.md", *(PROJECT / "docs").rglob("*.md")]
    text = "\n".join(page.read_text() for page in pages)
    text += "\n".join(path.read_text() for path in modules().values())
    quoted = re.findall(r"`(fastdiff(?:\.[A-Za-z_]\w*)+)[`(]", text)
    return {*quoted, *re.findall(r"^::: (\S+)", text, re.MULTILINE)}


def resolve(name: str) -> object:
    """The object of a dotted name, through as many modules as it takes."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError as error:
            if not name.startswith(error.name or ""):
                raise
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(name)


@pytest.mark.parametrize("name", sorted(documented_names()))
def test_documented_names_exist(name: str) -> None:
    resolve(name)
