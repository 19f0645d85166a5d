"""Builds the native libraries of fastdiff with ninja. Everything else is in pyproject.toml.

    fastdiff/_C_cpu.so        CPU kernels and their registration, if there is a C++ compiler
    fastdiff/_C_cuda.so       CUDA kernels and their registration, if there is nvcc
    fastdiff/_dispatch.*      calls and autograd nodes in C++, without which Python's serve
    fastdiff/_build_info.json the facts of this build

The first two use only LibTorch's stable ABI, so they run under any torch >= 2.10; the third is
loaded only under the torch that it was built with, and its failure does not fail the build.

Environment
    FASTDIFF_BUILD         cpu: no CUDA; cuda: CUDA too (what is missing is an error); none: pure
                           Python; default: what the machine can build
    CUDA_HOME              the CUDA toolkit; default: that of the nvcc on the PATH
    CXX                    the C++ compiler; default: c++, g++ or clang++ on the PATH
    CXXFLAGS               more options for it
    TORCH_CUDA_ARCH_LIST   such as "8.0;9.0+PTX", "Ampere" or "native"; default: 7.5 to 12.0 as far
                           as nvcc knows them
    MAX_JOBS               compilers at a time; default: one per core and per 3 GB of free memory

A build in place (pip install -e, build_ext --inplace) works in build/ and replaces fastdiff/*.so at
its end. Any other one (pip wheel, pip install) works in a temporary folder and leaves the checkout
alone.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
sys.path.insert(0, str(ROOT))  # build isolation does not

import cuda_archs  # noqa: E402

TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10, the first with all that the bindings use
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",  # this and the next: without them GCC does not vectorize square roots
    "-fno-trapping-math",  # and selects between floats
    "-ffp-contract=fast",
    "-Wall",
    f"-ffile-prefix-map={ROOT}/=",  # error messages name csrc/..., not this machine's folders
]
if platform.machine() == "x86_64":
    # Whole registers in the AVX-512 clones: 10 % on Box-Muller (Zen 4). GCC's default is half.
    CXX_FLAGS.append("-mprefer-vector-width=512")
# GCC and clang have this one; it vectorizes the marked loops without needing an OpenMP runtime.
SIMD_FLAG = "-fopenmp-simd"
BUILD_INFO = "_build_info.json"


def say(message: str) -> None:
    print(f"fastdiff: {message}", flush=True)


def find_cxx() -> str | None:
    candidates = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    return next((c for c in candidates if c and shutil.which(shlex.split(c)[0])), None)


def find_cuda_home() -> pathlib.Path | None:
    """The toolkit's folder: CUDA_HOME, or where the nvcc on the PATH says that it lives."""
    if home := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return pathlib.Path(home) if (pathlib.Path(home) / "bin/nvcc").exists() else None
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    # `which nvcc` may be a wrapper script; a dry run prints the real folder as TOP.
    probe = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"^#\$ TOP=(.+)$", probe.stderr, re.MULTILINE)
    home = pathlib.Path(found[1].strip()) if found else pathlib.Path(nvcc).resolve().parent.parent
    home = pathlib.Path(os.path.normpath(home))
    return home if (home / "bin/nvcc").exists() else None


def max_jobs() -> int:
    if jobs := os.environ.get("MAX_JOBS"):
        if not (jobs.isdecimal() and len(jobs) < 10):
            raise SystemExit(f"fastdiff: MAX_JOBS is {jobs[:50]!r}; expected a number")
        return max(1, int(jobs))
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, memory // (3 << 30)))


def stem(name: str) -> str:
    """_C_cpu of fastdiff._C_cpu."""
    return name.rpartition(".")[2]


@contextlib.contextmanager
def build_folder(kept: bool) -> Iterator[tuple[pathlib.Path, int]]:
    """A folder for one build at a time, and its lock; the kept one has what the last build left."""
    import fcntl

    if kept:
        folder = ROOT / "build" / f"native-{sysconfig.get_platform()}"
        folder.mkdir(parents=True, exist_ok=True)
    else:
        folder = pathlib.Path(tempfile.mkdtemp(dir=scratch()))
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another build is at work in {folder}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, lock.fileno()


_scratch: list[str] = []


def scratch() -> str:
    """A temporary folder that goes away with this process."""
    if not _scratch:
        _scratch.append(tempfile.mkdtemp(prefix="fastdiff-build-"))
        atexit.register(shutil.rmtree, _scratch[0], ignore_errors=True)
    return _scratch[0]


def replace_libraries(package: pathlib.Path, built: list[pathlib.Path], planned: set[str]) -> None:
    """Put new libraries into a package, and take away those of an earlier, larger build.

    Until all new ones are there under other names, nothing changes. Then each old one gives way to
    a new file: a running process may have mapped the old one.
    """
    package.mkdir(parents=True, exist_ok=True)
    new = {file.name: package / f".{file.name}.{os.getpid()}" for file in built}
    try:
        for file in built:
            shutil.copy(file, new[file.name])
        for name, file in new.items():
            file.replace(package / name)
    finally:
        for file in new.values():
            file.unlink(missing_ok=True)
    stems = {name.partition(".")[0] for name in new}
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for old in [*package.glob("*.so"), *package.glob(BUILD_INFO)]:
        name = old.name.partition(".")[0]
        # Those of another Python stay, as long as this build has their like.
        failed = name not in stems and old.name.endswith(suffix)
        if name not in planned or failed:
            old.unlink()


def escaped(path: object) -> str:
    """A path as ninja wants it in build lines."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class Plan:
    """What will be built here: decided once, before setuptools asks for the extensions."""

    def __init__(self) -> None:
        self.wanted = os.environ.get("FASTDIFF_BUILD", "auto").lower()
        if self.wanted not in ("auto", "cpu", "cuda", "none"):
            raise SystemExit(
                f"fastdiff: FASTDIFF_BUILD is {self.wanted!r}; expected cpu, cuda or none"
            )
        self.cxx = None if self.wanted == "none" else find_cxx()
        self.cuda_home = None
        missing = "no C++ compiler found (CXX, PATH)"
        if sys.platform != "linux":
            missing, self.cxx = "native kernels are built on Linux only", None
        if self.wanted == "none":
            say("FASTDIFF_BUILD=none: pure Python, every op runs on the PyTorch reference")
        elif self.cxx is None and self.wanted == "auto":
            say(f"{missing}: pure Python, every op runs on the PyTorch reference")
        elif self.cxx is None:
            raise SystemExit(f"fastdiff: FASTDIFF_BUILD={self.wanted}, but {missing}")
        elif self.cxx is not None and self.wanted != "cpu":
            self.cuda_home = find_cuda_home()
            if self.cuda_home is None:
                say("no nvcc found (CUDA_HOME, PATH): building without the CUDA kernels")
        if self.wanted == "cuda" and self.cuda_home is None:
            raise SystemExit(
                "fastdiff: FASTDIFF_BUILD=cuda, but there is no nvcc: set CUDA_HOME to the toolkit"
            )

    def extensions(self) -> list[Extension]:
        names = []
        if self.cxx:
            names += ["_C_cpu", "_dispatch"]
        if self.cuda_home:
            names.append("_C_cuda")
        return [
            Extension(f"fastdiff.{name}", sources=[], optional=name == "_dispatch")
            for name in names
        ]


class NinjaBuild(build_ext):
    """Compiles all extensions in one ninja run; under build/ later ones find the objects."""

    def get_ext_filename(self, fullname: str) -> str:
        if stem(fullname).startswith("_C_"):
            # Loaded by torch, not by Python: no interpreter tag.
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def run(self) -> None:
        """Build everything, then put it where it belongs: in place only if that was asked for."""
        package = ROOT / "fastdiff" if self.inplace else pathlib.Path(self.build_lib) / "fastdiff"
        if not self.extensions:
            replace_libraries(package, [], set())
            return
        with build_folder(kept=self.inplace) as (folder, lock):
            built = self.compile(folder, lock)
            planned = {stem(ext.name) for ext in self.extensions} | {"_build_info"}
            replace_libraries(package, built, planned)

    def compile(self, folder: pathlib.Path, lock: int) -> list[pathlib.Path]:
        """The new libraries in the build folder; without those that are optional and failed."""
        import ninja
        import torch

        # Build isolation puts torch somewhere else every time; behind a link the commands stay the
        # same, and ninja recompiles only what changed.
        torch_link = folder / "torch"
        torch_link.unlink(missing_ok=True)
        torch_link.symlink_to(pathlib.Path(torch.__file__).parent)
        text, facts = self.ninja_text(folder, torch.__version__)
        (folder / "build.ninja").write_text(text)
        (folder / BUILD_INFO).write_text(json.dumps(facts, indent=2) + "\n")
        jobs = max_jobs()
        say(f"compiling with {PLAN.cxx}, {jobs} jobs at a time (MAX_JOBS), in {folder}")
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-C", str(folder), "-j", str(jobs)]
        if self.verbose:
            command.append("-v")

        def ninja_fails(*arguments: str) -> bool:
            # It has the lock too: killed alone, this process leaves it behind at work.
            return bool(subprocess.run([*command, *arguments], pass_fds=[lock]).returncode)

        # -k 0: what an optional library fails at does not keep the others from being built.
        failed = ninja_fails("-k", "0")
        built = [folder / BUILD_INFO]
        for ext in self.extensions:
            file = pathlib.Path(self.get_ext_filename(ext.name)).name
            if not failed or not ninja_fails(file):
                built.append(folder / file)
            elif ext.optional:
                say(f"{file} could not be built, see above; Python does what it would do")
            else:
                raise SystemExit(
                    "fastdiff: the native build failed, see above. FASTDIFF_BUILD=cpu leaves the "
                    "CUDA kernels out, FASTDIFF_BUILD=none everything."
                )
        return built

    def ninja_text(self, folder: pathlib.Path, torch_version: str) -> tuple[str, dict[str, str]]:
        """What ninja shall do, and the facts of this build that fastdiff/_native.py reads."""
        include = [f"-I{CSRC / 'include'}"]
        # -isystem: no warnings from torch's headers, and no dependency on their time stamps.
        torch_flags = [
            "-isystem",
            "torch/include",
            f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
            "-DUSE_CUDA" if PLAN.cuda_home else "",
        ]
        more = shlex.split(os.environ.get("CXXFLAGS", ""))
        cxx = shlex.join([*CXX_FLAGS, SIMD_FLAG, *include, *filter(None, torch_flags), *more])
        lines = [
            f"cxx = {PLAN.cxx}",
            f"cxxflags = {cxx}",
            "rule cxx",
            "  command = $cxx -MMD -MF $out.d $cxxflags $flags -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $in",
            "rule link",
            "  command = $cxx -shared $in -o $out $libs",
            "  description = link $out",
        ]

        def compile_(source: pathlib.Path, flags: str = "", rule: str = "cxx") -> str:
            target = f"{source.parent.name}_{source.stem}.o"
            lines.append(f"build {target}: {rule} {escaped(source)}")
            lines.append(f"  flags = {flags}")
            return target

        def link(name: str, objects: list[str], libs: str) -> None:
            lines.append(f"build {escaped(name)}: link {' '.join(objects)}")
            lines.append(f"  libs = {libs}")

        torch_libs = "-Ltorch/lib -ltorch_cpu -ltorch"
        names = {stem(ext.name) for ext in self.extensions}
        # Torch's headers are no dependencies for ninja: with another torch its users compile anew.
        uses_torch = shlex.join([f"-DFASTDIFF_TORCH={torch_version}"])
        archs: list[str] = []
        cuda_version = ""
        if "_C_cpu" in names:
            objects = [compile_(s) for s in sorted((CSRC / "cpu").glob("*.cpp"))]
            objects.append(compile_(CSRC / "bindings/cpu.cpp", uses_torch))
            objects.append(compile_(CSRC / "bindings/build_info.cpp"))
            link("_C_cpu.so", objects, torch_libs)
        if "_C_cuda" in names:
            nvcc = PLAN.cuda_home / "bin/nvcc"
            chosen = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
            archs = cuda_archs.choose(chosen, cuda_archs.known_to(nvcc))
            version = subprocess.run(
                [nvcc, "--version"], capture_output=True, text=True, check=True
            )
            cuda_version = re.search(r"release ([\d.]+)", version.stdout)[1]
            say(f"CUDA {cuda_version} in {PLAN.cuda_home}, for {' '.join(archs)}")
            nvcc_flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]
            nvcc_flags += [
                "-Xcompiler",
                "-fPIC,-fvisibility=hidden",
                "-ccbin",
                shlex.split(PLAN.cxx)[-1],
            ]
            nvcc_flags += ["--threads", "2", *include, *cuda_archs.gencode(archs)]
            lines += [
                f"nvcc = {shlex.quote(str(nvcc))}",
                f"nvccflags = {shlex.join(nvcc_flags)}",
                "rule nvcc",
                "  command = $nvcc -MD -MF $out.d $nvccflags $flags -c $in -o $out",
                "  depfile = $out.d",
                "  deps = gcc",
                "  description = compile $in",
            ]
            objects = [compile_(s, rule="nvcc") for s in sorted((CSRC / "cuda").glob("*.cu"))]
            cuda_include = shlex.join(["-isystem", str(PLAN.cuda_home / "include")])
            objects.append(compile_(CSRC / "bindings/cuda.cpp", f"{cuda_include} {uses_torch}"))
            # The static runtime: no dependency on the CUDA version that torch was built with.
            lib = next(
                (d for d in ("lib64", "lib", "targets/x86_64-linux/lib")
                 if (PLAN.cuda_home / d / "libcudart_static.a").exists()),
                "lib64",
            )  # fmt: skip
            cudart = shlex.join([f"-L{PLAN.cuda_home / lib}"]) + " -lcudart_static -ldl -lrt"
            link(
                "_C_cuda.so", objects, f"{torch_libs} {cudart} -lpthread {self.torch_cuda(folder)}"
            )
        python_include = ["-isystem", sysconfig.get_paths()["include"]]
        if "_dispatch" in names:
            # All of torch's headers, where the others may see only the stable ones.
            flags = ["-UTORCH_TARGET_VERSION", "-UUSE_CUDA", *python_include]
            object_ = compile_(CSRC / "bindings/dispatch.cpp", f"{shlex.join(flags)} {uses_torch}")
            name = pathlib.Path(self.get_ext_filename("fastdiff._dispatch")).name
            link(name, [object_], f"{torch_libs} -lc10 -ltorch_python")
        facts = {
            "compiler": compiler_version(),
            "torch_version": torch_version,
            "torch_target_version": "2.10",
            "cuda_version": cuda_version,
            "cuda_arch_list": " ".join(archs),
        }
        return "\n".join(lines) + "\n", facts

    def torch_cuda(self, folder: pathlib.Path) -> str:
        """Link flags for libtorch_cuda, which a CPU-only torch at build time does not have.

        The symbols used are resolved when a CUDA-enabled torch loads the library; an empty stand-in
        with the right name records the dependency.
        """
        if (folder / "torch/lib/libtorch_cuda.so").exists():
            return "-ltorch_cuda"
        stand_in = folder / "stand_in"
        stand_in.mkdir(exist_ok=True)
        command = [*shlex.split(PLAN.cxx), "-shared", "-x", "c++", os.devnull]
        command += ["-Wl,-soname,libtorch_cuda.so", "-o", str(stand_in / "libtorch_cuda.so")]
        subprocess.run(command, check=True)
        return "-Wl,--no-as-needed -Lstand_in -ltorch_cuda"


class WheelForEveryPython(bdist_wheel):
    """The kernels know nothing of Python, and where _dispatch does not load, Python serves."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def compiler_version() -> str:
    command = [*shlex.split(PLAN.cxx), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[
        0
    ]


def outside_of_checkout() -> dict[str, dict[str, str]]:
    """Options of setuptools' commands under which a build that is not in place writes elsewhere."""
    if not {"bdist_wheel", "build", "egg_info", "install"} & set(sys.argv):
        return {}
    return {"build": {"build_base": scratch()}, "egg_info": {"egg_base": scratch()}}


PLAN = Plan()
setup(
    ext_modules=PLAN.extensions(),
    cmdclass={"build_ext": NinjaBuild, "bdist_wheel": WheelForEveryPython},
    options=outside_of_checkout(),
)
