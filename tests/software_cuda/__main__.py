"""Runs a command on the software CUDA device.

    python -m tests.software_cuda COMMAND ...
    python -m tests.software_cuda --device sm_80,devices=2 python -m fastdiff.train --device cuda

The command and the Python processes that it starts see the device. Each of them ends with exit code
70 if its device has reported a problem that nobody took.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import software_cuda


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.software_cuda",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--device",
        default="sm_90",
        help="sm_75, sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120, then, behind commas, devices=N, "
        "memory=GIB, lazy, rocm (default: sm_90)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="any command line")
    options = parser.parse_args()
    if not options.command:
        parser.error("no command to run")
    try:
        settings = software_cuda.Settings.parse(options.device)
    except ValueError as error:
        parser.error(str(error))
    program = options.command[0]
    if Path(program).name.startswith("python") and (option := _hides_the_device(options.command)):
        parser.error(f"python {option} starts without the folder that brings the device")
    path = sys.executable if program in ("python", "python3") else shutil.which(program)
    if path is None:
        parser.error(f"no command {program!r}")
    software_cuda.activate(settings)
    os.execv(path, [path, *options.command[1:]])


def _hides_the_device(command: list[str]) -> str | None:
    """The option of Python, if there is one, under which it reads no PYTHONPATH or no site."""
    for argument in command[1:]:
        if not argument.startswith("-") or argument.startswith(("-c", "-m", "-X", "-W", "--")):
            return None
        if set(argument) & set("IES"):
            return argument
    return None


if __name__ == "__main__":
    main()
