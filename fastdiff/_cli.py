"""What the command lines share: one line per error on stderr, exit codes, missing extras.

Exit codes: 0 done; 1 the run failed on its way; 2 wrong input, nothing was written; 130 Ctrl-C.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from typing import NoReturn

from fastdiff.training.errors import RunError, UserError, one_line

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
    try:
        _require(needs)
        code = main(sys.argv[1:])
    except (UserError, RunError) as error:
        print(f"{program}: error: {one_line(error)}", file=sys.stderr)
        code = error.exit_code
    except PermissionError as error:
        print(f"{program}: error: {error.filename}: {error.strerror}", file=sys.stderr)
        code = UserError.exit_code
    except KeyboardInterrupt:
        print(f"\n{program}: interrupted", file=sys.stderr)
        code = INTERRUPTED
    sys.exit(code)


def say(message: str) -> None:
    """Tell the user something; stderr, because stdout is for results."""
    print(message, file=sys.stderr)


def _require(modules: tuple[str, ...]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f'missing {", ".join(missing)}; install the extra with: pip install "fastdiff[train]"'
        )
