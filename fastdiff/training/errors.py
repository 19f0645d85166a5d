"""The two ways a run ends early that deserve one line instead of a traceback."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST = 2000

_OUT_OF_MEMORY = (
    "can't allocate memory",
    "annot allocate memory",
    "bad_alloc",
    "can't start new thread",
    "failed to map segment",
)


class UserError(ValueError):
    """Something only the user can put right; the message names the argument and the remedy.

    Raised before any file is written. Command lines print it and exit with code 2.
    """

    exit_code = 2


class RunError(RuntimeError):
    """A run that started well and cannot go on: a non-finite loss, a full disk.

    The message names the step and what is still intact. Command lines exit with code 1.
    """

    exit_code = 1


class NotFiniteError(RunError):
    """A loss or gradient that is not finite, at ``step``; the weights before it are those to keep.

    The training loop goes back to the last checkpoint once before it lets this through.
    """

    def __init__(self, step: int, message: str) -> None:
        super().__init__(f"step {step}: {message}")
        self.step = step


@contextmanager
def naming(argument: str) -> Iterator[None]:
    """Turn a library's ``ValueError`` or ``TypeError`` about ``argument`` into a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"{argument}: {one_line(error)}") from error


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that there is no memory left, or no room for it in the addresses."""
    # torch has a type for GPUs alone; its CPU allocator, and whoever starts threads or maps
    # libraries, say it in words.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or getattr(error, "errno", None) == errno.ENOMEM
        or any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened if it repeats what a file made endless."""
    text = printable(" ".join(str(error).split()))
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."


def printable(name: object) -> str:
    r"""Return a name that somebody else gave, such as that of a file, as text for a terminal.

    What would move the cursor, colour the screen, start a line or turn the direction of writing
    is shown as an escape (``\x1b``); so are the bytes of a name that is not UTF-8.
    """
    return "".join(map(_visible, str(name)))


def printable_lines(message: str) -> str:
    """The same for a message of several lines, which keeps them."""
    return "\n".join(map(printable, message.split("\n")))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode()
