"""Settings from a file: YAML, JSON or TOML."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from fastdiff.training.errors import UserError, one_line, printable
from fastdiff.training.files import read_file

# More than all settings with all their comments.
_MOST_BYTES = 1 << 20

_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_config_file(path: str | Path) -> dict[str, Any]:
    """Read the settings in a YAML, JSON or .toml file (``yaml.safe_load``: no code is run)."""
    import yaml

    what = f"--config {printable(path)}"
    text = _text(path, what)
    toml = Path(path).suffix.lower() == ".toml"
    try:
        # JSON is a subset of YAML as far as settings go, so one parser reads both.
        values = _toml(text, what) if toml else yaml.safe_load(text)
    except UserError:
        raise
    except Exception as error:
        # Beside their own, parsers let errors through of what they build: dates, long integers,
        # nesting deeper than the stack.
        kind = "TOML" if toml else "YAML or JSON"
        raise UserError(f"{what}: not valid {kind}: {one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{what}: expected settings as `name: value` lines")
    return values


def _text(path: str | Path, what: str) -> str:
    if os.path.exists(path) and not os.path.isfile(path):
        # To open a pipe would wait for somebody to write to it, to read a device may never end.
        kind = "a folder" if os.path.isdir(path) else "no regular file, but a pipe or device"
        raise UserError(f"{what}: is {kind}; give a file with settings")
    try:
        content = read_file(path, most=_MOST_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise UserError(f"{what}: {getattr(error, 'strerror', None) or error}") from error
    if content.startswith(_UTF16) or b"\0" in content:
        raise UserError(
            f"{what}: its text is UTF-16 or no text at all; save it as UTF-8 (in PowerShell: "
            "Set-Content -Encoding utf8)"
        )
    try:
        # With or without the mark that Windows editors put at the start.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{what}: line {line} is not UTF-8; save it as UTF-8") from error


def _toml(text: str, what: str) -> dict[str, Any]:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        raise UserError(f"{what}: TOML needs Python 3.11; write it as YAML") from None
    return tomllib.loads(text)
