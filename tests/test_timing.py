"""What is timed, how often, and in which order."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2cupy import timing
from gpt2cupy.errors import InputError
from gpt2cupy.timing import Timing, device_times, host_times


@given(st.lists(st.floats(1e-7, 10), min_size=1, max_size=60))
def test_median_and_spread(seconds):
    found = Timing.of(seconds)
    assert found.runs == len(seconds)
    assert found.p10_us <= found.median_us <= found.p90_us
    assert found.median_us == pytest.approx(np.median(seconds) * 1e6)
    assert found.p90_us == pytest.approx(np.percentile(seconds, 90) * 1e6)
    assert found.as_dict().keys() == {"median_us", "p10_us", "p90_us", "runs"}


@given(st.integers(0, 4), st.integers(1, 6), st.integers(1, 5))
def test_host_times_counts_its_calls(warmup, runs, inner):
    calls = []
    found = host_times(
        lambda: calls.append("call"),
        warmup=warmup,
        runs=runs,
        inner=inner,
        before=lambda: calls.append("before"),
    )
    assert found.runs == runs
    assert calls == (["before"] + ["call"] * inner) * (warmup + runs)


def test_host_times_divides_by_the_calls_of_a_run(monkeypatch):
    clock = iter(np.arange(0, 100, 3.0))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    assert host_times(lambda: None, warmup=1, runs=4, inner=2).median_us == 1.5e6


class FakeCupy(types.ModuleType):
    """Just enough of CuPy: writes down in which order work is queued; a run takes 8 ms."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.order: list[str] = []
        made = iter(("first", "last"))
        order = self.order

        class Event:
            def __init__(self) -> None:
                self.name = next(made)

            def record(self, stream: str) -> None:
                assert stream == "current"
                order.append(self.name)

            def synchronize(self) -> None:
                order.append("wait")

        class Data:
            def memset_async(self, value: int, size: int, stream: str) -> None:
                order.append(f"flush {size}")

        self.cuda = types.SimpleNamespace(
            Event=Event,
            get_current_stream=lambda: "current",
            get_elapsed_time=lambda first, last: 8.0,
            runtime=types.SimpleNamespace(
                getDevice=lambda: 0, getDeviceProperties=lambda device: {"l2CacheSize": 50}
            ),
        )
        self.empty = lambda size, dtype: types.SimpleNamespace(data=Data())


@pytest.fixture
def cupy(monkeypatch):
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    return fake


def test_events_stand_around_the_calls(cupy):
    found = device_times(
        lambda: cupy.order.append("call"),
        warmup=1,
        runs=2,
        inner=4,
        before=lambda: cupy.order.append("before"),
    )
    assert cupy.order == ["before", "first", *["call"] * 4, "last", "wait"] * 3
    assert (found.median_us, found.runs) == (2000, 2)


def test_a_cold_run_pushes_out_twice_the_cache_before_its_first_event(cupy):
    device_times(lambda: cupy.order.append("call"), warmup=0, runs=2, cold=True)
    assert cupy.order == ["flush 100", "first", "call", "last", "wait"] * 2


def test_several_calls_cannot_all_be_cold(cupy):
    with pytest.raises(InputError, match="cold cache"):
        device_times(lambda: None, inner=2, cold=True)


def test_the_clock_follows_the_array_module(cupy):
    assert timing.times(lambda: None, cupy, runs=3).median_us == 8000
    cupy.order.clear()
    assert timing.times(lambda: None, np, runs=3).runs == 3
    assert not cupy.order


@pytest.mark.gpu
def test_events_and_flush_on_a_gpu():
    import cupy

    array = cupy.zeros(1 << 20, np.float32)
    for cold in (False, True):
        found = device_times(lambda: cupy.add(array, 1, out=array), runs=5, cold=cold)
        assert 0 < found.p10_us <= found.p90_us < 1e6
