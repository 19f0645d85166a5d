"""What a build leaves behind: setup.py run on a copy of the checkout, with compilers that only
write the files they were asked for."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
BUILD_PACKAGES = ("setuptools", "ninja")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="native builds are for Linux"),
    pytest.mark.skipif(
        not all(importlib.util.find_spec(name) for name in BUILD_PACKAGES),
        reason=f"needs {', '.join(BUILD_PACKAGES)}",
    ),
]

COMPILER = """#!/bin/sh
case "$*" in
  *--version*) echo "fake compiler, release 13.0"; exit;;
  *--list-gpu-arch*) printf 'compute_75\\ncompute_80\\ncompute_90\\n'; exit;;
esac
[ -n "$FAKE_STARTED" ] && touch "$FAKE_STARTED"
sleep ${FAKE_SECONDS:-0}
for argument; do
  case "$argument" in *$FAKE_FAILS*) [ -n "$FAKE_FAILS" ] && exit 1;; esac
  [ "$last" = -o ] && echo "${FAKE_CONTENT:-new}" > "$argument"
  last=$argument
done
exit 0
"""
BUILD = "from setuptools import build_meta; build_meta.build_{kind}({folder!r})"


class Checkout:
    """A copy of the project with libraries that an editable install has left in it."""

    def __init__(self, folder: pathlib.Path):
        self.root, self.wheels = folder / "checkout", folder / "wheels"
        for name in ("csrc", "fastdiff", "triton_kernels"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / name, self.root / name, ignore=ignored)
        for name in ("setup.py", "cuda_archs.py", "pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, self.root)
        for name in ("_C_cpu", "_C_cuda", "_dispatch.cpython-39-x86_64-linux-gnu"):
            (self.root / f"fastdiff/{name}.so").write_text("installed")
        self.tools = folder / "tools"
        (self.tools / "bin").mkdir(parents=True)
        for name in ("c++", "nvcc"):
            (self.tools / "bin" / name).write_text(COMPILER)
            (self.tools / "bin" / name).chmod(0o755)
        self.temporary = folder / "temporary"
        self.temporary.mkdir()

    def command(self, kind: str) -> list[str]:
        self.wheels.mkdir(exist_ok=True)
        return [sys.executable, "-c", BUILD.format(kind=kind, folder=str(self.wheels))]

    def environment(self, **variables: str) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("TORCH_CUDA", "FASTDIFF"))}
        tools = {
            "CXX": str(self.tools / "bin/c++"),
            "CUDA_HOME": str(self.tools),
            "TMPDIR": str(self.temporary),
            "MAX_JOBS": "8",
        }
        return kept | tools | variables

    def start(self, kind: str, **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(kind),
            cwd=self.root,
            env=self.environment(**variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def build(self, kind: str, **variables: str) -> tuple[int, str]:
        process = self.start(kind, **variables)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def files(self) -> dict[str, bytes]:
        """Everything in the checkout but what Python keeps of what it imports."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in self.root.rglob("*")
            if path.is_file() and path.parent.name != "__pycache__"
        }

    def libraries(self) -> dict[str, str]:
        """Name up to the first dot, and content; hidden files too."""
        found = (self.root / "fastdiff").glob("*.so*"), (self.root / "fastdiff").glob(".*.so*")
        return {path.name.partition(".so")[0]: path.read_text() for f in found for path in f}

    def wheel(self) -> dict[str, str]:
        (path,) = self.wheels.glob("*.whl")
        with zipfile.ZipFile(path) as wheel:
            names = [n for n in wheel.namelist() if n.endswith((".so", "_build_info.json"))]
            return {n.removeprefix("fastdiff/").partition(".")[0]: wheel.read(n) for n in names}


@pytest.fixture
def checkout(tmp_path: pathlib.Path) -> Checkout:
    return Checkout(tmp_path)


CPU = {"_C_cpu", "_build_info", "_dispatch"}


@pytest.mark.parametrize(
    ("variables", "built"),
    [
        ({"FASTDIFF_BUILD": "none"}, set()),
        ({"FASTDIFF_BUILD": "cpu"}, CPU),
        pytest.param({}, {*CPU, "_C_cuda"}, marks=pytest.mark.slow),
        ({"FASTDIFF_BUILD": "cpu", "FAKE_FAILS": "bindings_cpu.o"}, None),
        pytest.param(
            {"FASTDIFF_BUILD": "cpu", "FAKE_FAILS": "bindings_dispatch.o"},
            CPU - {"_dispatch"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["none", "cpu", "cuda", "failing", "optional failing"],
)
def test_a_wheel_leaves_the_checkout_alone(checkout, variables, built):
    before = checkout.files()
    code, output = checkout.build("wheel", **variables)
    assert (code == 0) == (built is not None), output
    assert checkout.files() == before
    assert not list(checkout.temporary.iterdir()), "temporary files are left"
    if built is not None:
        assert set(checkout.wheel()) == built


def test_an_editable_install_replaces_the_libraries(checkout):
    mapped = open(checkout.root / "fastdiff/_C_cpu.so")  # noqa: SIM115 as a running process has it
    code, output = checkout.build("editable", FASTDIFF_BUILD="cpu")
    assert code == 0, output
    found = checkout.libraries()
    built = {name.partition(".")[0] for name in found} | {"_build_info"}
    assert built == CPU  # _C_cuda would still be loaded
    facts = json.loads((checkout.root / "fastdiff/_build_info.json").read_text())
    assert facts["cuda_version"] == ""
    assert facts["compiler"] == "fake compiler, release 13.0"
    assert "_dispatch.cpython-39-x86_64-linux-gnu" in found  # of another Python
    assert found["_C_cpu"] == "new\n"
    assert mapped.read() == "installed"
    mapped.close()


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "failing",
    [
        "_C_cuda.so",
        *(pytest.param(x, marks=slow) for x in ("cpu_eps_loss.o", "bindings_build_info.o")),
    ],
)
def test_a_failed_build_in_place_changes_nothing(checkout, failing):
    before = checkout.libraries()
    code, output = checkout.build("editable", FAKE_FAILS=failing)
    assert code != 0
    assert "the native build failed" in output
    assert checkout.libraries() == before


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, *(pytest.param(x, marks=slow) for x in (signal.SIGINT, signal.SIGTERM))],
)
def test_an_interrupted_build_in_place_changes_nothing(checkout, tmp_path, number):
    before = checkout.libraries()
    started = tmp_path / "started"
    process = checkout.start("editable", FAKE_STARTED=str(started), FAKE_SECONDS="1")
    deadline = time.monotonic() + 120
    while not started.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(number)  # to Python alone: ninja goes on, or is told by Python
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert checkout.libraries() == before
    code, output = checkout.build("editable")  # waits for what is left of the first
    assert code == 0, output
    assert checkout.libraries()["_C_cuda"] == "new\n"


def test_two_builds_in_place_take_turns(checkout):
    processes = [
        checkout.start("editable", FAKE_SECONDS="0.1", FAKE_CONTENT=content)
        for content in ("first", "second")
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("another build is at work" in output for output in outputs) == 1
    assert set(checkout.libraries().values()) <= {"first\n", "second\n", "installed"}


def test_another_torch_compiles_its_users_anew(checkout):
    """ninja does not watch torch's headers, and _dispatch serves only the torch of its build."""
    assert checkout.build("editable", FASTDIFF_BUILD="cpu")[0] == 0
    (folder,) = (checkout.root / "build").glob("native-*")
    rules = (folder / "build.ninja").read_text()
    import torch

    for name in ("bindings_cpu.o", "bindings_dispatch.o"):
        flags = rules.partition(f"build {name}:")[2].splitlines()[1]
        assert f"-DFASTDIFF_TORCH={torch.__version__}" in flags


def test_asking_for_what_cannot_be_built_is_an_error(checkout):
    nothing = checkout.tools / "empty"
    nothing.mkdir()
    without = {"PATH": str(nothing), "CUDA_HOME": str(nothing), "CXX": ""}
    for wanted, message in [
        ("cpu", "FASTDIFF_BUILD=cpu, but no C++ compiler found"),
        ("cuda", "FASTDIFF_BUILD=cuda, but no C++ compiler found"),
        ("gpu", "FASTDIFF_BUILD is 'gpu'"),
    ]:
        code, output = checkout.build("wheel", FASTDIFF_BUILD=wanted, **without)
        assert code != 0
        assert message in output, output
    code, output = checkout.build(
        "wheel", FASTDIFF_BUILD="cuda", **without | {"CXX": str(checkout.tools / "bin/c++")}
    )
    assert code != 0
    assert "there is no nvcc" in output
    for jobs in ("²", "9" * 5000):
        code, output = checkout.build("wheel", FASTDIFF_BUILD="cpu", MAX_JOBS=jobs)
        assert code != 0
        assert f"MAX_JOBS is '{jobs[:50]}'" in output
        assert "ValueError" not in output
    code, output = checkout.build("wheel", **without)  # nobody asked
    assert code == 0, output
    assert "no C++ compiler found (CXX, PATH): pure Python" in output
