"""Python runs this at its start if the folder is on PYTHONPATH: child processes get the device."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
sys.path.append(str(_here.parents[1]))

import software_cuda  # noqa: E402

software_cuda.install()

# Another sitecustomize, which this one hides.
_others = [folder for folder in sys.path if Path(folder or ".").resolve() != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec and _spec.loader:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
