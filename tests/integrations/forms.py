"""What U-Nets do around a normalization, each as one method, and what of it fuses."""

import torch
import torch.nn.functional as F
from torch import nn


def nonlinearity(x):
    """DDIM's and latent diffusion's."""
    return x * torch.sigmoid(x)


class Swish(nn.Module):
    def forward(self, x):
        return x.mul(x.sigmoid())


WRITES_WHAT_AUTOGRAD_KEEPS = {
    "image_written_between",
    "image_written_by_a_module",
    "kept_for_later",
}
"""These have no gradients."""


class Rectified(nn.Module):
    def forward(self, x):
        return x.relu_()


class Adaptive(nn.Module):
    """What U-Nets do with a time embedding, by name of the method that forward calls."""

    def __init__(self, body):
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1)
        self.embed, self.gate = nn.Linear(6, 8), nn.Linear(8, 4)
        self.act, self.swish, self.relu = nn.SiLU(inplace=True), Swish(), Rectified()
        self.instance = nn.InstanceNorm2d(4, affine=True)
        self.body = body

    def forward(self, x, emb):
        return getattr(self, self.body)(self.conv(x), self.embed(emb))

    def bias(self, h, e):
        return F.silu(self.norm(h + e[:, :4, None, None]))

    def bias_first(self, h, e):
        return F.silu(self.norm(e[:, :4].unsqueeze(-1).unsqueeze(-1) + h))

    def adaptive(self, h, e):
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        return F.silu(self.norm(h) * (1 + scale) + shift)

    def everything(self, h, e):
        scale, shift = e[..., None, None].chunk(2, dim=1)
        h = shift + (scale + 1) * self.norm(h + shift)
        return h * torch.sigmoid(h)

    def without_activation(self, h, e):
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        return self.conv(self.norm(h) * (1 + scale) + shift)

    def scale_alone(self, h, e):
        return F.silu(self.norm(h) * (1.0 + e[:, :4, None, None]))

    def added_in_place(self, h, e):
        h = self.conv(h)
        if e is not None:
            h += e[:, :4, None, None]
        h = self.norm(h)
        return nonlinearity(h)

    def method_in_place(self, h, e):
        h = self.conv(h)
        h.add_(e[:, :4, None, None])
        return self.swish(self.norm(h))

    def argument_in_place(self, h, e):
        t = e[:, :4].unsqueeze(2).unsqueeze(3).to(h.dtype)
        h = self.conv(h)
        h = F.silu(self.norm(h.add_(t)), inplace=True)
        return self.conv(h)

    def methods(self, h, e):
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        n = self.norm(h.add(shift))
        return self.act(n.mul(1 + scale).add(shift))

    def functions(self, h, e):
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        n = self.norm(torch.add(h, shift))
        n = torch.add(torch.mul(n, torch.add(scale, 1)), shift)
        return n * n.sigmoid()

    def multiplied_and_added(self, h, e):
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        return F.silu(torch.addcmul(shift, self.norm(h), scale + 1))

    def sum_and_product(self, h, e):
        scale, shift = e[:, :, None, None].chunk(2, dim=1)
        g = self.norm(h)
        g = g + g * scale + shift
        return nonlinearity(g)

    def sum_around_calls(self, h, e):
        h = self.norm(h)
        scale = self.gate(e)[:, :, None, None]
        return self.swish(h * (1 + scale) + self.gate(-e)[:, :, None, None])

    def in_float32(self, h, e):
        h = h + e[:, :4, None, None]
        return F.silu(self.norm(h.float()).type(h.dtype))

    def functional(self, h, e):
        h = h + e[:, :4, None, None]
        h = F.group_norm(h, 2, self.norm.weight, self.norm.bias, eps=self.norm.eps)
        return nonlinearity(h)

    def by_instance(self, h, e):
        h = self.instance(h + e[:, :4, None, None])
        return F.silu(h)

    def branches(self, h, e):
        if e is None:
            h = self.norm(h)
        else:
            t = e[:, :4, None, None]
            h = self.norm(h + t)
        return self.act(h)

    # What must be left out of the op, in part or altogether.

    def sum_used_twice(self, h, e):
        h = h + e[:, :4, None, None]
        return h + F.silu(self.norm(h))

    def norm_used_twice(self, h, e):
        n = self.norm(h)
        return F.silu(n * (1 + e[:, :4, None, None])) + n

    def product_used_twice(self, h, e):
        n = self.norm(h) * (1 + e[:, :4, None, None])
        return F.silu(n + e[:, 4:, None, None]) + n

    def one_for_the_batch(self, h, e):
        return F.silu(self.norm(h + e[:1, :4, None, None]))

    def per_pixel(self, h, e):
        return F.silu(self.norm(h + e[:, :4, None, None].expand_as(h)))

    def per_row(self, h, e):
        return F.silu(self.norm(h) * (1 + h.mean(3, keepdim=True)))

    def two_plus(self, h, e):
        return F.silu(self.norm(h) * (2 + e[:, :4, None, None]))

    def subtracted(self, h, e):
        return F.silu(self.norm(h - e[:, :4, None, None]))

    def scaled_sum(self, h, e):
        return F.silu(self.norm(torch.add(h, e[:, :4, None, None], alpha=2)))

    def added_to_what_others_have(self, h, e):
        keep = h.view(h.shape)
        h += e[:, :4, None, None]
        return F.silu(self.norm(h)) + keep

    def wider(self, h, e):
        return F.silu(self.norm(h) + e[:, :4, None, None].double())

    def written_between(self, h, e):
        bias = e[:, :4, None, None].clone()
        h = h + bias
        bias.zero_()
        return F.silu(self.norm(h)) + bias

    def image_written_between(self, h, e):
        h = h.clone()
        n = self.norm(h)
        h[0] = 1.0
        return F.silu(n) + h

    def image_written_by_a_module(self, h, e):
        n = self.norm(h)
        return self.relu(h) + self.swish(n)

    def overwritten_by_its_activation(self, h, e):
        n = self.norm(h)
        y = self.act(n)
        return y + n

    def detached_view(self, h, e):
        h = self.conv(h)
        keep = h.detach()
        h += e[:, :4, None, None]
        return F.silu(self.norm(h)) + keep

    def in_a_loop(self, h, e):
        y = h
        for _ in range(3):
            y = self.norm(y)
            y = nonlinearity(y)
        return y + h

    def kept_for_later(self, h, e):
        kept = [h]
        n = self.norm(h)
        kept.pop().mul_(2)
        return F.silu(n) + h

    def left_early(self, h, e):
        n = h
        for _ in range(3):
            n = self.norm(n)
            if e is not None:
                break
            n = self.swish(n)
        h = h.clone().mul_(2)
        return n + h

    def asked_again_and_again(self, h, e):
        n = h[None]
        while n.dim() > 4:
            n = self.norm(h)
        return F.silu(n) + n.shape[0]

    def in_a_list(self, h, e):
        n = self.norm(h)
        return sum([f(n) for f in (self.swish, nonlinearity)])

    def closed_over(self, h, e):
        n = self.norm(h)
        f = lambda: n + 1  # noqa: E731
        n = self.swish(n)
        return f() + n

    def without_gradients_inside(self, h, e):
        with torch.no_grad():
            n = self.norm(h)
        return F.silu(n) + h

    def in_a_try(self, h, e):
        try:
            n = self.norm(h)
            n = F.silu(n)
        finally:
            h = self.conv(h)
        return n + h


# What each op of the graph has: b(ias), (s)cale, s(h)ift, a(ctivation).
FUSED = {
    "bias": "ba",
    "bias_first": "ba",
    "adaptive": "sha",
    "everything": "bsha",
    "without_activation": "sh",
    "scale_alone": "sa",
    "added_in_place": "ba",
    "method_in_place": "ba",
    "argument_in_place": "ba",
    "methods": "bsha",
    "functions": "bsha",
    "multiplied_and_added": "sha",
    "sum_and_product": "sha",
    "sum_around_calls": "sha",
    "in_float32": "ba",
    "functional": "ba",
    "by_instance": "ba",
    "branches": "ba",
    "sum_used_twice": "a",
    "norm_used_twice": "",
    "product_used_twice": "s",
    "one_for_the_batch": "a",
    "per_pixel": "a",
    "per_row": "",
    "two_plus": "",
    "subtracted": "a",
    "scaled_sum": "a",
    "added_to_what_others_have": "a",
    "wider": "",
    "written_between": "",
    "image_written_between": "",
    "image_written_by_a_module": "",
    "overwritten_by_its_activation": "",
    "detached_view": "a",
    "kept_for_later": "",
    "closed_over": "a",
    "without_gradients_inside": "",
}
"""Of the one op in it: channel_(b)ias, (s)cale, s(h)ift, (a)ctivation."""
