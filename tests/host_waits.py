"""What makes a host wait for its device, counted on a CPU as a GPU would wait."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = {
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::is_nonzero",
    "aten::equal",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
}
INDEXING = {"aten::index", "aten::index_put_", "aten::index_put"}
WAITING_METHODS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__"}


def is_mask(index):
    """An index whose number of elements only the device knows."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)


class CountWaits(TorchDispatchMode):
    """Records the operators that make a host wait for a device, as a GPU's would."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if name in WAITS or (name in INDEXING and any(map(is_mask, args[1]))):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class CountMethods(TorchFunctionMode):
    """The same for methods of tensors, which on a CPU need no operator."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITING_METHODS:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))
