"""From which seed a fuzzer runs, for how long, and how to repeat one case of it.

    FASTDIFF_FUZZ_SECONDS  time for each fuzzer; default: what it asks for, seconds
    FASTDIFF_FUZZ_SEED     an integer; default 0, so that every default run is the same
    FASTDIFF_FUZZ_CASE     the number of the only case to run

A fuzzer is a function of a `random.Random`, whose state depends on the fuzzer's name, the seed and
the case's number alone. It raises if something is wrong.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection

Case = Callable[[random.Random], None]


def seed() -> int:
    return int(os.environ.get("FASTDIFF_FUZZ_SEED", "0"))


def seconds(default: float) -> float:
    """The time that a fuzzer may take, which takes `default` if nobody says otherwise."""
    return float(os.environ.get("FASTDIFF_FUZZ_SECONDS", default))


def generator(name: str, number: int) -> random.Random:
    """The random numbers of one case."""
    return random.Random(f"{name} {seed()} {number}")


def how_to_repeat(number: int) -> str:
    """A command that runs this case of the current test alone."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "tests/fuzz").rsplit(" (", 1)[0]
    return f"FASTDIFF_FUZZ_SEED={seed()} FASTDIFF_FUZZ_CASE={number} pytest -n 0 '{test}'"


def fuzz(name: str, case: Case, default_seconds: float) -> int:
    """Run cases until the time is over, in this process. Returns how many ran."""
    return _run(name, case, seconds(default_seconds), lambda _: None)


def fuzz_in_process(
    name: str, case: Case, default_seconds: float, *, hang_seconds: float = 120
) -> int:
    """The same in a process of its own, for cases that may crash or hang it.

    `case` is imported there by its module's name. A case hangs that takes `hang_seconds`; what
    comes before the first one, a start that a full machine makes slow, may take five times as long.
    """
    limit = seconds(default_seconds)
    if "FASTDIFF_FUZZ_CASE" in os.environ:  # where a debugger can see it
        return fuzz(name, case, default_seconds)
    context = multiprocessing.get_context("spawn")
    current = context.Value("q", -1, lock=False)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, case, limit, current, sender))
    process.start()
    sender.close()
    try:
        before = None
        while not receiver.poll(hang_seconds if current.value >= 0 else 5 * hang_seconds):
            if current.value == before:
                raise AssertionError(f"a case hangs; repeat: {how_to_repeat(current.value)}")
            before = current.value
        ran, failure = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        died = f"of {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        raise AssertionError(
            f"the process died {died}; repeat: {how_to_repeat(current.value)}"
        ) from None
    finally:
        process.kill()
        process.join()
    assert failure is None, failure
    return ran


def _child(name: str, case: Case, limit: float, current: object, sender: Connection) -> None:
    def begin(number: int) -> None:
        current.value = number

    try:
        sender.send((_run(name, case, limit, begin), None))
    except AssertionError:
        sender.send((0, traceback.format_exc()))


def _run(name: str, case: Case, limit: float, begin: Callable[[int], None]) -> int:
    chosen = os.environ.get("FASTDIFF_FUZZ_CASE")
    numbers = itertools.count() if chosen is None else [int(chosen)]
    end = time.monotonic() + limit
    ran = 0
    for number in numbers:
        begin(number)
        try:
            case(generator(name, number))
        except Exception as error:
            message = f"case {number} of {name!r}; repeat: {how_to_repeat(number)}"
            raise AssertionError(message) from error
        ran += 1
        if time.monotonic() > end:
            break
    print(f"{name}: {ran} cases from seed {seed()}")
    return ran
