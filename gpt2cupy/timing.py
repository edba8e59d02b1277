"""How everything is timed: warm-up, device events or a host clock, median with p10 and p90."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Times of one thing measured again and again, in microseconds."""

    median_us: float
    p10_us: float
    p90_us: float
    runs: int

    @classmethod
    def of(cls, seconds: Any) -> Timing:
        times = np.asarray(seconds, np.float64) * 1e6
        low, middle, high = np.percentile(times, [10, 50, 90])
        return cls(float(middle), float(low), float(high), len(times))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def host_times(call: Callable[[], Any], *, warmup: int = 5, runs: int = 50) -> Timing:
    """Wall-clock time of a call that has ended when it returns."""
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Timing.of(seconds)


def device_times(
    call: Callable[[], Any], *, warmup: int = 5, runs: int = 50, inner: int = 1
) -> Timing:
    """Time between two events around ``inner`` calls on the current stream, per call."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    for _ in range(warmup):
        call()
    seconds = []
    for _ in range(runs):
        first.record(stream)
        for _ in range(inner):
            call()
        last.record(stream)
        last.synchronize()
        seconds.append(cupy.cuda.get_elapsed_time(first, last) / 1e3 / inner)
    return Timing.of(seconds)
