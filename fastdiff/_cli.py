"""What the command lines share: one line per error on stderr, exit codes, missing extras.

Exit codes: 0 done; 1 the run failed on its way; 2 wrong input, nothing was written; 130 Ctrl-C;
128 + N another signal. A reader that leaves (``| head``) loses the output, not the work: the code
is that of the work.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from fastdiff import _streams
from fastdiff.training.errors import (
    RunError,
    UserError,
    is_out_of_memory,
    one_line,
    printable,
    printable_lines,
)

Config = TypeVar("Config")

INTERRUPTED = 130  # the shell's convention for a process ended by SIGINT: 128 + 2

# Errors of the system that another name or another permission mends.
_OF_THE_USER = frozenset(
    (
        errno.EACCES,
        errno.EINVAL,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    )
)


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
    with _streams.standard() as (out, _):
        code = _guarded(program, main, needs)
        out.flush()
        if out.error is not None:
            say(f"{program}: error: cannot write to standard output: {out.error.strerror}")
            code = code or RunError.exit_code
    sys.exit(code)


def _guarded(program: str, main: Callable[[list[str]], int], needs: tuple[str, ...]) -> int:
    """The exit code of ``main``, and a line on stderr for what it raises."""
    try:
        _require(needs)
        return main(sys.argv[1:])
    except SystemExit as stopped:  # --help
        return stopped.code
    except (UserError, RunError) as error:
        say(f"{program}: error: {one_line(error)}")
        return error.exit_code
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if is_out_of_memory(error):
            say(f"{program}: error: out of memory ({_first_line(error)})")
            return RunError.exit_code
        if not isinstance(error, OSError):
            raise
        name = f"{printable(error.filename)}: " if error.filename is not None else ""
        say(f"{program}: error: {name}{error.strerror or one_line(error)}")
        return UserError.exit_code if error.errno in _OF_THE_USER else RunError.exit_code
    except KeyboardInterrupt as error:
        say(f"\n{program}: interrupted{f'; {one_line(error)}' if str(error) else ''}")
        return INTERRUPTED


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


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def _require(modules: tuple[str, ...]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'missing {", ".join(missing)}; install the extra with: pip install "fastdiff[train]"'
        )
