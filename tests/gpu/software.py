"""What tests have to know about a device that is software (tests/software_cuda)."""

import torch


def on_software_device() -> bool:
    """Whether torch's own operators are the CPU's and a kernel's time means nothing."""
    return torch.cuda.is_available() and "software" in torch.cuda.get_device_name()
