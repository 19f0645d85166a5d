"""Networks of other projects, narrow and with nothing left at zero."""

import copy

import diffusers
import torch
from integrations.openai_unet import GroupNorm32, SiLU, UNetModel
from nn.networks import SMALL, unzero
from torch import nn

from fastdiff.nn.diffusers_format import unet2d_config


def ddpm_cifar(**changes):
    """UNet2DModel as DDPM uses it for CIFAR-10, with narrow layers."""
    config = unet2d_config(SMALL["ddpm_cifar10"].replace(**changes))
    return diffusers.UNet2DModel(**config), lambda m, x: m(x, torch.tensor([3, 70])).sample, 3


def iddpm_cifar():
    config = unet2d_config(SMALL["iddpm_cifar10"])
    return diffusers.UNet2DModel(**config), lambda m, x: m(x, torch.tensor([3, 70])).sample, 3


def small_sd():
    model = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    text = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(5))
    return model, lambda m, x: m(x, torch.tensor([3, 70]), text.to(x.dtype)).sample, 4


def vae():
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    return model, lambda m, x: m(x).sample, 3


def guided(silu=nn.SiLU, name="iddpm_cifar10"):
    config = SMALL[name].replace(num_classes=None)
    return UNetModel(config, silu), lambda m, x: m(x, torch.tensor([3, 70])), 3


NETWORKS = {
    "UNet2DModel": ddpm_cifar,
    "UNet2DModel-scale_shift": iddpm_cifar,
    "UNet2DConditionModel": small_sd,
    "AutoencoderKL": vae,
    "guided-diffusion": guided,
    "improved-diffusion": lambda: guided(SiLU),
    "guided-additive": lambda: guided(name="ddpm_cifar10"),
}


def make(name):
    torch.manual_seed(0)
    model, run, channels = NETWORKS[name]()
    unzero(model)
    x = torch.randn(2, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    return model.eval(), run, x


def norms(model):
    return [m for m in model.modules() if isinstance(m, nn.GroupNorm)]


def in_float64(model):
    """A copy that computes in float64 throughout, where OpenAI's code says float32."""
    exact = copy.deepcopy(model).double()
    for m in exact.modules():
        if isinstance(m, GroupNorm32):
            m.__class__ = nn.GroupNorm
    if hasattr(exact, "time_embed"):
        exact.time_embed.register_forward_pre_hook(lambda m, args: args[0].double())
    return exact


def gradients(model, run, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = run(model, x)
    y.float().square().mean().backward()
    named = dict(model.named_parameters())
    # Softmax does not see the keys' bias: its gradient is 0, and what is computed is rounding.
    grads = {n: p.grad for n, p in named.items() if p.grad is not None and "to_k.bias" not in n}
    return y.detach(), {"x": x.grad, **grads}
