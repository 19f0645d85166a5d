"""``python -m fastdiff.integrations.hub_kernel FOLDER``: this build for Hugging Face's ``kernels``.

Writes a kernel repository as `kernels` (https://github.com/huggingface/kernels) loads it: a folder
for each build variant, named for the torch, the GPU's platform and the machine that it serves, with
``metadata.json`` and the package. The libraries use LibTorch's stable ABI alone, so one variant
serves every torch from 2.10 on:

    FOLDER/build/torch-stable-abi210-cu130-x86_64-linux/    CUDA and CPU kernels
    FOLDER/build/torch-stable-abi210-cpu-x86_64-linux/      CPU kernels

``kernels.get_local_kernel(Path("FOLDER"))`` is then the package ``fastdiff``; uploaded, the folder
is what ``kernels.get_kernel`` downloads.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import platform
import shutil

import fastdiff
from fastdiff import _cli, _native
from fastdiff.training.errors import UserError

PROGRAM = "python -m fastdiff.integrations.hub_kernel"

# Modules import each other as `fastdiff`, so the package gets that name, whatever name `kernels`
# gives to this file.
LOADER = '''"""fastdiff {version}, loaded from a kernel repository under its own name."""

import importlib.util
import pathlib
import sys

_file = pathlib.Path(__file__).parent / "fastdiff" / "__init__.py"

if "fastdiff" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "fastdiff", _file, submodule_search_locations=[str(_file.parent)]
    )
    sys.modules["fastdiff"] = importlib.util.module_from_spec(_spec)
    try:
        _spec.loader.exec_module(sys.modules["fastdiff"])
    except BaseException:
        del sys.modules["fastdiff"]
        raise

_loaded = sys.modules["fastdiff"]
if _loaded.__version__ != "{version}":
    raise ImportError(
        f"fastdiff {{_loaded.__version__}} is imported already; this kernel is fastdiff {version}. "
        "A process can hold one: load the kernel first, or uninstall the other"
    )
globals().update({{name: getattr(_loaded, name) for name in _loaded.__all__}})
__all__ = list(_loaded.__all__)
'''


def export(folder: pathlib.Path) -> list[pathlib.Path]:
    """Write the variants of this build under ``folder/build``; return their folders.

    Raises
    ------
    UserError
        If this installation has no CPU library, or a variant is there already.
    """
    build = _native.build_info()
    if build is None or (reason := _native.load("cpu")) is not None:
        raise UserError(f"no compiled kernels to export: {'pure Python' if not build else reason}")
    abi = build.torch_target_version.replace(".", "")
    backends: dict[str, dict[str, object]] = {"cpu": {"type": "cpu"}}
    if build.cuda_version:
        name = "cu" + build.cuda_version.replace(".", "")
        backends[name] = {"type": "cuda", "archs": build.cuda_arch_list.split()}
    machine = f"{platform.machine()}-{platform.system().lower()}"
    variants = {
        folder / "build" / f"torch-stable-abi{abi}-{name}-{machine}": backend
        for name, backend in backends.items()
    }
    for variant in variants:
        if variant.exists():
            raise UserError(f"{variant} exists; expected a folder without it")
    for variant, backend in variants.items():
        _write_variant(variant, backend)
    return list(variants)


def _write_variant(variant: pathlib.Path, backend: dict[str, object]) -> None:
    unwanted = ["__pycache__", "*.py[co]", "_dispatch.*"]  # one Python's and one torch's
    if backend["type"] == "cpu":
        unwanted.append("_C_cuda.so")
    package = pathlib.Path(fastdiff.__file__).parent
    # In a checkout triton_kernels/ lies beside the package, which finds it through its path.
    ignored = shutil.ignore_patterns(*unwanted, "triton_kernels")
    shutil.copytree(package, variant / "fastdiff", ignore=ignored)
    import fastdiff.triton_kernels as kernels

    shutil.copytree(
        pathlib.Path(kernels.__file__).parent,
        variant / "fastdiff" / "triton_kernels",
        ignore=shutil.ignore_patterns(*unwanted),
    )
    (variant / "__init__.py").write_text(LOADER.format(version=fastdiff.__version__))
    metadata = {
        "id": f"_fastdiff_{backend['type']}_{fastdiff.__version__.replace('.', '_')}",
        "name": "fastdiff",
        "version": int(fastdiff.__version__.partition(".")[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
    }
    (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Export; print the folders; return the exit code."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Write this build as a kernel repository for Hugging Face's `kernels`.",
    )
    parser.add_argument("folder", type=pathlib.Path, help="the repository's folder")
    for variant in export(parser.parse_args(argv).folder):
        print(variant)
    return 0


if __name__ == "__main__":
    _cli.run(PROGRAM, main)
