"""A network trained by `python -m fastdiff.train`, sampled by diffusers: fastdiff is not imported.

python -m fastdiff.train
python examples/load_in_diffusers.py runs/digits --out digits.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import DDPMPipeline
from PIL import Image


def main() -> None:
    """Load RUN/model into a DDPMPipeline and draw a row of images."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder of `python -m fastdiff.train`")
    parser.add_argument("--num", type=int, default=8, help="images")
    parser.add_argument("--steps", type=int, default=100, help="DDPM steps")
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="file to write")
    args = parser.parse_args()

    pipeline = DDPMPipeline.from_pretrained(args.run / "model")
    images = pipeline(
        args.num,
        generator=torch.Generator().manual_seed(0),
        num_inference_steps=args.steps,
    ).images
    width, height = images[0].size
    row = Image.new(images[0].mode, (args.num * width, height))
    for i, image in enumerate(images):
        row.paste(image, (i * width, 0))
    row.save(args.out)
    print(f"{args.num} images in {args.out}")


if __name__ == "__main__":
    main()
