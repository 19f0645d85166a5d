"""Streams, events and graphs behave as the CUDA manual says."""

from __future__ import annotations

import pytest
import torch

from software_cuda import device

pytestmark = pytest.mark.gpu


def late_ones(side: torch.cuda.Stream) -> torch.Tensor:
    """Zeros that become ones on a busy stream."""
    x = torch.zeros(4, device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(1000)
        x.fill_(1)
    return x


@pytest.mark.parametrize("lazy", [False, True])
def test_work_of_another_stream_is_seen_only_after_a_wait(lazy):
    side = torch.cuda.Stream()
    with device.lazy(lazy):
        x = late_ones(side)
        assert not side.query()
        early = x.clone()
        torch.cuda.current_stream().wait_stream(side)
        late = x.clone()
        x.record_stream(side)
        assert late.tolist() == [1] * 4
    assert early.tolist() == [0] * 4


@pytest.mark.parametrize("lazy", [False, True])
def test_a_copy_to_the_host_is_there_after_a_wait(lazy):
    """Until then the host reads NaN, whatever was there; a copy from there still finds it."""
    x, pinned = torch.ones(4, device="cuda"), torch.ones(4).pin_memory()
    with device.lazy(lazy):
        torch.cuda._sleep(1000)
        pinned.copy_(x, non_blocking=True)
        assert pinned.isnan().all()
        torch.cuda.synchronize()
        assert pinned.tolist() == [1] * 4
        torch.cuda._sleep(1000)
        y = pinned.to("cuda", non_blocking=True)
        pinned.copy_(x * 2, non_blocking=True)
        assert y.tolist() == [1] * 4
        assert pinned.tolist() == [2] * 4


def test_events_order_streams_and_can_be_timed():
    side, begin, end = (
        torch.cuda.Stream(),
        *(torch.cuda.Event(enable_timing=True) for _ in range(2)),
    )
    x = late_ones(side)
    begin.record()
    end.record(side)
    assert not end.query()
    torch.cuda.current_stream().wait_event(end)
    assert x.tolist() == [1] * 4
    assert begin.elapsed_time(end) >= 0


def captured(function) -> torch.cuda.CUDAGraph:
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def test_a_graph_replays_with_what_its_inputs_hold_then():
    x, y = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
    graph = captured(lambda: y.copy_(x * 2 + 1))
    for value in (5, 7):
        x.fill_(value)
        graph.replay()
        assert y.tolist() == [2 * value + 1] * 3


def test_a_graph_repeats_a_host_value_that_it_captured():
    x = torch.zeros(3, device="cuda")
    steps = iter(range(100))
    graph = captured(lambda: x.add_(float(next(steps))))
    x.zero_()
    graph.replay()
    graph.replay()
    assert x.tolist() == [2.0] * 3  # 1 twice, not 2 and 3


def test_random_numbers_of_a_graph_are_new_in_every_replay():
    x = torch.zeros(8, device="cuda")
    graph = captured(lambda: x.normal_())
    found = []
    for _ in range(3):
        graph.replay()
        found.append(tuple(x.tolist()))
    assert len(set(found)) == 3


def test_waiting_while_capturing_is_an_error():
    x = torch.ones(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match=r"captur"), torch.cuda.graph(graph):
        x.sum().item()


@pytest.mark.parametrize("joined", [True, False])
def test_a_forked_stream_has_to_be_joined(joined):
    x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()

    def capture() -> None:
        with torch.cuda.graph(graph):
            main = torch.cuda.current_stream()
            side.wait_stream(main)
            with torch.cuda.stream(side):
                x.mul_(2)
            if joined:
                main.wait_stream(side)

    if joined:
        capture()
        graph.replay()
        assert x.tolist() == [2] * 3
    else:
        with pytest.raises(RuntimeError, match="unjoined"):
            capture()


def test_seeds_and_states_of_the_generator():
    torch.cuda.manual_seed(3)
    first = torch.randn(5, device="cuda")
    state = torch.cuda.get_rng_state()
    second = torch.randn(5, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.randn(5, device="cuda"), second)
    torch.cuda.manual_seed(3)
    assert torch.equal(torch.randn(5, device="cuda"), first)
    assert not torch.equal(first, second)


def test_convolutions_keep_channels_last_in_a_graph_and_behind_a_sleep():
    x = torch.randn(2, 8, 6, 6, device="cuda").to(memory_format=torch.channels_last)
    weight = torch.randn(4, 8, 3, 3, device="cuda")
    expected = torch.conv2d(x, weight, padding=1)
    assert expected.is_contiguous(memory_format=torch.channels_last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = torch.conv2d(x, weight, padding=1)
    graph.replay()
    torch.cuda._sleep(1000)
    late = torch.conv2d(x, weight, padding=1)
    for found in (captured, late):
        assert found.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(found, expected)
