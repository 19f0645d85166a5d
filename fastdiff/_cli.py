"""What the command lines share: one line per error on stderr, exit codes, missing extras.

Exit codes: 0 done; 1 the run failed on its way; 2 wrong input, nothing was written; 130 Ctrl-C.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from fastdiff.training.errors import RunError, UserError, one_line, printable, printable_lines

Config = TypeVar("Config")

INTERRUPTED = 130  # the shell's convention for a process ended by SIGINT: 128 + 2


def run(program: str, main: Callable[[list[str]], int], needs: tuple[str, ...] = ()) -> NoReturn:
    """Run ``main(argv)`` and leave the process with its exit code.

    Parameters
    ----------
    program : str
        The command as the user typed it, e.g. ``"python -m fastdiff.train"``: starts each error.
    main : callable
        Takes the arguments without the program's name and returns the exit code.
    needs : tuple of str
        Modules of the ``train`` extra that must be importable before ``main`` is called.
    """
    # What Pillow finds odd in a file that it reads all the same; what it cannot read is counted.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        _require(needs)
        try:
            code = main(sys.argv[1:])
        except SystemExit as stopped:  # --help
            code = stopped.code
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `| head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (UserError, RunError) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        code = error.exit_code
    except PermissionError as error:
        name = printable(error.filename)
        print(f"{program}: error: {name}: {error.strerror}", file=sys.stderr)
        code = UserError.exit_code
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        print(f"{program}: error: out of memory ({_first_line(error)})", file=sys.stderr)
        code = RunError.exit_code
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def parse(kind: type[Config], argv: list[str], program: str, **options: Any) -> Config:
    """``tyro.cli`` whose errors are a `UserError`, not a box of several lines."""
    import tyro

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(kind, args=argv, prog=program, **options)
    except SystemExit as stopped:
        if stopped.code != UserError.exit_code:
            raise  # --help
        raise UserError(f"{_unboxed(errors.getvalue())}; see {program} --help") from None


def _unboxed(box: str) -> str:
    """Return what tyro's error box says, without its help texts but with the flags it suggests."""
    sections: list[list[str]] = [[]]
    for line in box.splitlines()[1:]:  # without the title
        text = line.strip("│╭╮╰╯ ")
        if text.strip("─-"):
            sections[-1].append(text)
        elif sections[-1]:  # a rule; the first of a box in ASCII lies above the message
            sections.append([])
    message, *rest = sections
    suggestions = [t.split()[0] for section in rest for t in section if t.startswith("--")]
    hint = f" (did you mean {' or '.join(suggestions)}?)" if suggestions else ""
    return " ".join(message).rstrip(".") + hint


def say(message: str) -> None:
    """Tell the user something; stderr, because stdout is for results."""
    print(printable_lines(message), file=sys.stderr)


def _out_of_memory(error: Exception) -> bool:
    # torch has a type for GPUs alone; its CPU allocator says it in words.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _require(modules: tuple[str, ...]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'missing {", ".join(missing)}; install the extra with: pip install "fastdiff[train]"'
        )
