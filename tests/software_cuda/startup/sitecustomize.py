"""Python runs this at its start if the folder is on PYTHONPATH: child processes get the device."""

import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_here = Path(__file__).resolve().parent
sys.path.append(str(_here.parents[1]))

import software_cuda  # noqa: E402

try:
    software_cuda.install()
except ValueError as error:  # Python would go on without the device
    sys.stderr.write(f"{error}\n")
    sys.stderr.flush()
    os._exit(2)

# Another sitecustomize, which this one hides.
_others = [folder for folder in sys.path if Path(folder or ".").resolve() != _here]
_spec = importlib.machinery.PathFinder.find_spec("sitecustomize", _others)
if _spec and _spec.loader:
    _spec.loader.exec_module(importlib.util.module_from_spec(_spec))
