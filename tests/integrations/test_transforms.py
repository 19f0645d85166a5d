"""All ops under torch.export, AOTInductor and torch.func."""

import pytest
import torch

import fastdiff
from fastdiff import NoiseSchedule, ops

SCHEDULE = NoiseSchedule.linear(10)
A, S = SCHEDULE.sqrt_alpha_bars.float(), SCHEDULE.sqrt_one_minus_alpha_bars.float()
DDPM = SCHEDULE.ddpm_table(range(10))
DDIM = SCHEDULE.ddim_table(range(10), eta=0.5)

CALLS = {
    "q_sample": lambda x, t, noise: ops.q_sample(x, t, A, S, noise),
    "posterior_mean": lambda x, t, noise: ops.posterior_mean(noise, x, t, A, S),
    "eps_loss": lambda x, t, noise: ops.eps_loss(x, noise, reduction="none"),
    "ddim_step": lambda x, t, noise: ops.ddim_step(x, 0.5 * x, t, DDIM, noise=noise),
    "ddpm_step": lambda x, t, noise: ops.ddpm_step(x, 0.5 * x, t, DDPM, noise=noise),
    "vlb_terms": lambda x, t, noise: torch.stack(
        ops.vlb_terms(noise.clamp(-1, 1), noise, x, t, DDPM, noise=noise)
    ),
    "group_norm_silu": lambda x, t, noise: ops.group_norm_silu(
        x, 2, None, None, channel_bias=noise.mean((2, 3))
    ),
}


class Net(torch.nn.Module):
    def __init__(self, *names):
        super().__init__()
        self.names = names

    def forward(self, x, t, noise):
        return [CALLS[name](x, t, noise) for name in self.names]


def inputs():
    x, noise = torch.randn(2, 3, 4, 6, 6).unbind(0)
    return x, torch.tensor([0, 9, 3]), noise


@pytest.mark.parametrize("name", CALLS)
def test_export(name):
    program = torch.export.export(Net(name), inputs())
    other = inputs()
    found = [str(n.target) for n in program.graph.nodes if "fastdiff" in str(n.target)]
    assert found
    assert all(target.startswith("fastdiff.") for target in found)
    torch.testing.assert_close(program.module()(*other), Net(name)(*other), rtol=0, atol=0)


@pytest.mark.slow
def test_aot_inductor(tmp_path):
    """One package with all ops, loaded and run on the CPU."""
    net = Net(*CALLS)
    program = torch.export.export(net, inputs())
    path = str(tmp_path / "net.pt2")
    loaded = torch._inductor.aoti_load_package(
        torch._inductor.aoti_compile_and_package(program, package_path=path)
    )
    other = inputs()
    torch.testing.assert_close(loaded(*other), net(*other))


def loss_of(name):
    """Of one sample, without its batch dimension."""

    def loss(x, t, noise):
        return CALLS[name](x[None], t[None], noise[None]).square().sum()

    return loss


@pytest.mark.parametrize("name", CALLS)
def test_vmap_of_grad(name):
    x, t, noise = inputs()
    loss = loss_of(name)
    found = torch.func.vmap(torch.func.grad(loss))(x, t, noise)
    leaf = x.clone().requires_grad_()
    sum(loss(*sample) for sample in zip(leaf, t, noise, strict=True)).backward()
    largest = leaf.grad.abs().max().item()
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-5 * largest)
    values = torch.func.vmap(loss)(x, t, noise)
    expected = torch.stack([loss(*sample) for sample in zip(x, t, noise, strict=True)])
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("outside", [-1, 10])
def test_timesteps_out_of_range_are_found_under_vmap(outside):
    x, t, noise = inputs()
    t[1] = outside
    with pytest.raises(IndexError, match=f"t has values from .*{outside}"):
        torch.func.vmap(torch.func.grad(loss_of("q_sample")))(x, t, noise)


def test_raw_operators_say_what_to_use_instead():
    x, t, noise = inputs()

    def loss(x):
        return torch.ops.fastdiff.q_sample(x, t, A, S, noise, None, None, 0, None, None).sum()

    with pytest.raises(RuntimeError, match=r"use fastdiff\.ops\.q_sample, which does"):
        torch.func.grad(loss)(x)
    with pytest.raises(RuntimeError, match=r"use fastdiff\.ops\.q_sample, which does"):
        torch.func.jvp(loss, (x,), (noise,))


@pytest.mark.parametrize("quiet", [torch.no_grad, torch.inference_mode])
def test_raw_operators_record_only_where_somebody_listens(quiet):
    x = torch.randn(2, 4, 6, 6, requires_grad=True)
    arguments = (2, None, None, 1e-5, None, None, None, 1)
    recorded = torch.ops.fastdiff.group_norm_silu(x, *arguments)[0]
    assert recorded.requires_grad
    with quiet():
        plain = torch.ops.fastdiff.group_norm_silu(x, *arguments)[0]
    assert not plain.requires_grad
    assert torch.equal(plain, recorded)


def test_raw_operators_do_not_drop_tangents_without_gradients():
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(*torch.randn(2, 2, 4, 6, 6))
        with pytest.raises(RuntimeError, match="jvp function"):
            torch.ops.fastdiff.group_norm_silu(dual, 2, None, None, 1e-5, None, None, None, 1)


def test_per_sample_gradients_of_a_patched_network():
    network = torch.nn.Sequential(torch.nn.GroupNorm(2, 4), torch.nn.SiLU())
    parameters = dict(network.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(network, parameters, (x[None],)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    x, _, _ = inputs()
    expected = per_sample(parameters, x)
    fastdiff.patch(network)
    torch.testing.assert_close(per_sample(parameters, x), expected, rtol=1e-5, atol=1e-5)
