import pytest
import torch
from torch import nn

from fastdiff.training import EMA


def test_average_follows_the_formula_with_warm_up():
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.5)
    expected = model.weight.detach().clone().double()
    for n in range(20):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update()
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * model.weight.double()
    # Each of 20 updates rounds twice in float32 (eps 1.2e-7), on values of order 5.
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=0, atol=2e-5)
    assert ema.num_updates == 20


def test_buffers_are_copied_and_nothing_else_is_shared():
    model = nn.BatchNorm1d(2)
    ema = EMA(model, decay=0.999)
    model.running_mean.fill_(7.0)
    model.num_batches_tracked.fill_(3)
    ema.update()
    assert torch.equal(ema.model.running_mean, model.running_mean)
    assert ema.model.num_batches_tracked == 3
    assert not ema.model.training
    assert not any(p.requires_grad for p in ema.model.parameters())
    with torch.no_grad():
        model.weight.fill_(100.0)
    assert not torch.equal(ema.model.weight, model.weight)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_impossible_decays_are_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        EMA(nn.Linear(1, 1), decay)
