"""A copy of the project in which sources may be changed and tests run."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("csrc", "triton_kernels", "fastdiff", "benchmarks", "tests")


@dataclass(frozen=True)
class Outcome:
    """What pytest said."""

    code: int
    output: str

    @property
    def failed(self) -> bool:
        """Whether tests ran and failed: not an error of collection, nor a crash."""
        return self.code == 1


class ProjectCopy:
    """The sources, tests and built libraries in `folder`."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        for name in FOLDERS:
            skip = shutil.ignore_patterns("__pycache__", "triton_kernels")
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        # An installed package has the kernels there; without this the original's would be imported.
        (folder / "fastdiff/triton_kernels").symlink_to(folder / "triton_kernels")

    def replace(self, file: str, old: str, new: str) -> None:
        """Change the one place of `file` that reads `old`."""
        path = self.folder / file
        text = path.read_text()
        found = text.count(old)
        assert found == 1, f"{file} has {found} places that read {old!r}: update the mutant"
        path.write_text(text.replace(old, new))

    def restore(self, file: str) -> None:
        shutil.copy(ROOT / file, self.folder / file)

    def build_cpu(self) -> None:
        """Compile the CPU library of the copy."""
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        environment = {**os.environ, "FASTDIFF_BUILD": "cpu"}
        subprocess.run(command, cwd=self.folder, env=environment, check=True)

    def restore_libraries(self) -> None:
        """Those of the original, in place of what the copy built."""
        for library in self.folder.glob("fastdiff/*.so"):
            library.unlink()
        for library in ROOT.glob("fastdiff/*.so"):
            shutil.copy(library, self.folder / "fastdiff")

    def run(self, *tests: str, timeout: float = 600, own_kernels: bool = True) -> Outcome:
        """Run these tests in the copy, until the first failure.

        own_kernels: False spares compiling csrc again for the software CUDA device.
        """
        environment = {**os.environ, "PYTHONPATH": str(self.folder)}
        if not own_kernels:
            environment["SOFTWARE_CUDA_SOURCES"] = str(ROOT)
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-q", "-p", "no:cacheprovider"]
        with subprocess.Popen(
            [*command, *tests],
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # with the compilers that it started
                raise
        return Outcome(process.returncode, output)
