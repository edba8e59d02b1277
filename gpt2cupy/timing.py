"""How everything is timed: warm-up, device events or a host clock, median with p10 and p90."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .errors import InputError


@dataclass(frozen=True)
class Timing:
    """Times of one thing measured again and again, in microseconds.

    Attributes
    ----------
    median_us, p10_us, p90_us : float
    runs : int
        How many times were taken.
    """

    median_us: float
    p10_us: float
    p90_us: float
    runs: int

    @classmethod
    def of(cls, seconds: Any) -> Timing:
        """Median and spread of a sequence of seconds."""
        times = np.asarray(seconds, np.float64) * 1e6
        low, middle, high = np.percentile(times, [10, 50, 90])
        return cls(float(middle), float(low), float(high), len(times))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def host_times(
    call: Callable[[], Any],
    *,
    warmup: int = 5,
    runs: int = 50,
    inner: int = 1,
    before: Callable[[], Any] | None = None,
) -> Timing:
    """Wall-clock time of a call that has ended when it returns, per call.

    Parameters
    ----------
    call : callable
    warmup, runs : int
        Runs left out and runs counted.
    inner : int
        Calls in a run; the time of a run is divided by it.
    before : callable, optional
        Called before each run, outside the measured time.
    """
    seconds = []
    for number in range(warmup + runs):
        if before:
            before()
        start = time.perf_counter()
        for _ in range(inner):
            call()
        if number >= warmup:
            seconds.append((time.perf_counter() - start) / inner)
    return Timing.of(seconds)


def device_times(
    call: Callable[[], Any],
    *,
    warmup: int = 5,
    runs: int = 50,
    inner: int = 1,
    before: Callable[[], Any] | None = None,
    cold: bool = False,
) -> Timing:
    """Time between two events on the current stream around ``inner`` calls, per call.

    Parameters
    ----------
    call : callable
        Queues work on the current stream.
    warmup, runs, inner
        As in :func:`host_times`.
    before : callable, optional
        Queued before the first event of each run.
    cold : bool
        Push everything out of the L2 cache before each run. Otherwise a call finds there
        what the one before it left.

    Raises
    ------
    InputError
        For ``cold`` with more than one call in a run: the second would find a warm cache.
    """
    import cupy

    if cold and inner != 1:
        raise InputError(
            f"only the first of {inner} calls would find a cold cache",
            where="device_times",
            remedy="Take inner=1, or let each call read other memory.",
        )
    flush = _flush(cupy) if cold else None
    stream = cupy.cuda.get_current_stream()
    first, last = cupy.cuda.Event(), cupy.cuda.Event()
    seconds = []
    for number in range(warmup + runs):
        if before:
            before()
        if flush:
            flush()
        first.record(stream)
        for _ in range(inner):
            call()
        last.record(stream)
        last.synchronize()
        if number >= warmup:
            seconds.append(cupy.cuda.get_elapsed_time(first, last) / 1e3 / inner)
    return Timing.of(seconds)


def times(call: Callable[[], Any], xp: Any, **options: Any) -> Timing:
    """:func:`device_times` where ``xp`` is CuPy, :func:`host_times` where it is NumPy."""
    return (host_times if xp is np else device_times)(call, **options)


def _flush(cupy: Any) -> Callable[[], None]:
    """A call that overwrites a buffer twice the size of the L2 cache."""
    runtime = cupy.cuda.runtime
    size = 2 * runtime.getDeviceProperties(runtime.getDevice())["l2CacheSize"]
    buffer = cupy.empty(size, np.uint8)
    stream = cupy.cuda.get_current_stream()
    return lambda: buffer.data.memset_async(0, size, stream)
