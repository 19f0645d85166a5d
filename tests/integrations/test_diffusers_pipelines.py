"""diffusers' pipelines give the same images, and write the same files, with our schedulers."""

import json

import numpy as np
import pytest
import torch

diffusers = pytest.importorskip("diffusers")

from fastdiff.integrations import diffusers as ours  # noqa: E402

PAIRS = {
    "DDPM": (ours.DDPMScheduler, diffusers.DDPMScheduler),
    "DDIM": (ours.DDIMScheduler, diffusers.DDIMScheduler),
}


def tiny_unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.mark.parametrize("name", PAIRS)
def test_pipelines_give_the_same_images(name, tmp_path):
    pipeline_class = getattr(diffusers, f"{name}Pipeline")
    ours_class, theirs_class = PAIRS[name]
    pipeline_class(tiny_unet(), theirs_class(num_train_timesteps=100)).save_pretrained(tmp_path)
    images = []
    for cls in (theirs_class, ours_class):
        pipeline = pipeline_class.from_pretrained(tmp_path)
        pipeline.scheduler = cls.from_config(pipeline.scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        options = {"eta": 0.5} if name == "DDIM" else {}
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):  # the second batch goes on with the generator
            result = pipeline(
                2, generator=generator, num_inference_steps=20, output_type="np", **options
            )
        images.append(result.images)
        pipeline.save_pretrained(tmp_path / cls.__module__)
    assert type(pipeline.scheduler) is ours_class
    # Less than half a level of 255 after all steps.
    assert np.abs(images[0] - images[1]).max() < 0.5 / 255
    files = [
        json.loads((tmp_path / cls.__module__ / file).read_text())
        for file in ("model_index.json", "scheduler/scheduler_config.json")
        for cls in (theirs_class, ours_class)
    ]
    assert files[0]["scheduler"] == files[1]["scheduler"] == ["diffusers", f"{name}Scheduler"]
    assert files[2] == files[3]
