"""`fastdiff.train` whose gradients go through gloo: NCCL has no way into a device in software."""

import sys

import torch.distributed as dist

from fastdiff import _cli, train
from fastdiff.nn import PRESETS

real = dist.init_process_group


def over_gloo(backend: str, **options: object) -> None:
    real(backend.replace(":nccl", ":gloo"), **options)


if __name__ == "__main__":
    from tiny import TINY

    PRESETS["tiny"] = TINY
    if "--gloo" in sys.argv:
        sys.argv.remove("--gloo")
        dist.init_process_group = over_gloo
    _cli.run(train.PROGRAM, train.main, train.NEEDS)
