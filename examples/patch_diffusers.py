"""One line makes a diffusers network use the fused ops; its numbers stay.

python examples/patch_diffusers.py                       # random weights, DDPM's CIFAR-10 shape
python examples/patch_diffusers.py google/ddpm-cifar10-32 --batch 16
"""

from __future__ import annotations

import argparse
import time

import torch
from diffusers import UNet2DModel

import fastdiff


def main() -> None:
    """Compare outputs and seconds before and after `fastdiff.patch`."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", help="folder or name of a UNet2DModel")
    parser.add_argument("--batch", type=int, default=4, help="images per call")
    parser.add_argument("--channels", type=int, default=128, help="width of the random network")
    parser.add_argument("--repeats", type=int, default=5, help="calls that are timed, each")
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model:
        unet = UNet2DModel.from_pretrained(args.model)
    else:
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32,
            block_out_channels=tuple(args.channels * k for k in (1, 2, 2, 2)),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )
    unet = unet.to(device, memory_format=torch.channels_last).eval()
    size, channels = unet.config.sample_size, unet.config.in_channels
    x_t = torch.randn(args.batch, channels, size, size, device=device)

    before, seconds_before = run(unet, x_t, args.repeats)
    report = fastdiff.patch(unet)
    after, seconds_after = run(unet, x_t, args.repeats)
    print(f"{len(report.replaced)} normalizations replaced, {len(report.left)} left")
    print(f"largest difference  {(after - before).abs().max() / before.abs().max():.1e}, relative")
    print(f"seconds per call    {seconds_before:.4f} before, {seconds_after:.4f} after")


@torch.no_grad()
def run(unet: torch.nn.Module, x_t: torch.Tensor, repeats: int) -> tuple[torch.Tensor, float]:
    """The prediction, and the fastest of some calls."""
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up
        start = time.perf_counter()
        output = unet(x_t, 500).sample
        if x_t.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return output, min(seconds[1:])


if __name__ == "__main__":
    main()
