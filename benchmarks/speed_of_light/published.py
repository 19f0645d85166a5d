"""Measurements that others have published of kernels that can be counted here."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.audit.executed import Launch
from benchmarks.roofline import DEVICES
from benchmarks.speed_of_light import model
from benchmarks.speed_of_light.rivals import Case

# A call that takes less was waiting for Python: its launches are not ahead of the device.
HOST_BOUND_US = 40.0


@dataclass(frozen=True)
class Measurement:
    """`launch`: of that one of the call's launches alone."""

    case: Case
    device: str
    microseconds: float
    source: str
    launch: int | None = None


APPLY = "https://github.com/sgl-project/sglang/pull/23938"
_UPSAMPLER = "https://github.com/sgl-project/sglang/pull/26045"
_CHUNKS = "https://github.com/sgl-project/sglang/pull/24741"
_LIGER = "https://github.com/linkedin/Liger-Kernel/blob/ead96b61/benchmark/data/"
_VIDEO = (1, 128, 20, 256, 256)


def _sglang(shape: tuple[int, ...], chunked: float, ratio: float) -> list[Measurement]:
    """Time of the three launches, and of one launch, published as a multiple of it."""
    return [
        Measurement(Case("sglang", shape, 32, "bf16"), "H100", chunked, _UPSAMPLER),
        Measurement(
            Case("sglang one pass", shape, 32, "bf16"), "H100", chunked * ratio, _UPSAMPLER
        ),
    ]


MEASUREMENTS = [
    Measurement(Case("sglang", _VIDEO, 32, "bf16"), "H200", 259.66, APPLY),
    Measurement(Case("sglang", _VIDEO, 32, "bf16"), "H200", 178.08, APPLY, launch=2),
    Measurement(Case("sglang", _VIDEO, 32, "bf16"), "H100", 351.49, _CHUNKS),
    *_sglang((1, 512, 8, 45, 80), 70.05, 3.94),
    *_sglang((1, 512, 16, 90, 160), 261.87, 8.57),
    Measurement(Case("sglang", (1, 512, 16, 180, 320), 32, "bf16"), "H100", 987.52, _UPSAMPLER),
    *(
        Measurement(
            Case("liger", (128, channels, 512), channels // 4, "fp32", which=which),
            "B200",
            us,
            _LIGER + "all_benchmark_data.csv",
        )
        for which, times in (
            ("forward", {32: 17.54, 128: 26.62, 512: 63.52, 1024: 114.75, 2048: 219.10}),
            ("backward", {32: 66.43, 128: 71.71, 512: 126.98, 1024: 225.34, 2048: 425.86}),
        )
        for channels, us in times.items()
    ),
    *(
        Measurement(
            Case("liger", (batch, 4096, 512), 1024, "bf16"),
            "B200",
            us,
            _LIGER + "all_benchmark_data_cutile.csv",
        )
        for batch, us in {2: 27.14, 4: 27.87, 8: 33.79, 16: 58.34}.items()
    ),
]


@dataclass(frozen=True)
class Comparison:
    """A measurement beside the model; `limit` is that of the longest launch."""

    measurement: Measurement
    predicted: float
    limit: str

    @property
    def ratio(self) -> float:
        return self.predicted / self.measurement.microseconds

    @property
    def host_bound(self) -> bool:
        """Whether the time is one of Python; backward passes go through autograd."""
        of_backward = self.measurement.case.which == "backward"
        return self.measurement.microseconds < (2 if of_backward else 1) * HOST_BOUND_US


def call(document: Mapping[str, Any], case: Case, device: str) -> tuple[float, str] | None:
    """Predicted microseconds of another package's call, and its limit; None if not counted."""
    gpu = next(g for g in DEVICES if g.name == device)
    arch = "sm_80" if gpu.arch in ("sm_75", "sm_89") else gpu.arch
    counted = document["rivals"].get(f"{arch} {case.name}", {})
    if "launches" not in counted:
        return None
    launches = [Launch(**fields) for fields in counted["launches"]]
    found = model.predict_call(launches, gpu)
    longest = max(found, key=lambda p: p.seconds)
    total = sum(p.seconds for p in found) + counted["operators"] * model.LAUNCH_SECONDS
    return total * 1e6, longest.limit


def comparisons(document: Mapping[str, Any]) -> Iterator[Comparison]:
    """Every measurement whose kernels were counted."""
    for measured in MEASUREMENTS:
        found = call(document, measured.case, measured.device)
        if found is None:
            continue
        predicted, limit = found
        if measured.launch is not None:
            gpu = next(g for g in DEVICES if g.name == measured.device)
            counted = document["rivals"][f"{gpu.arch} {measured.case.name}"]
            launches = [Launch(**fields) for fields in counted["launches"]]
            one = model.predict_call(launches, gpu)[measured.launch]
            predicted, limit = one.seconds * 1e6, one.limit
        yield Comparison(measured, predicted, limit)


def error(found: list[Comparison]) -> tuple[float, float, Comparison]:
    """Median of |predicted / measured - 1|, the mean ratio, and the worst, of device times."""
    kept = [c for c in found if not c.host_bound]
    errors = [abs(c.ratio - 1) for c in kept]
    worst = max(kept, key=lambda c: abs(c.ratio - 1))
    return statistics.median(errors), statistics.geometric_mean(c.ratio for c in kept), worst
