"""The launcher, as far as it goes without a GPU: what it checks, casts and refuses."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2cupy.errors import InputError
from gpt2cupy.ops.core import launch
from gpt2cupy.ops.core.tape import load, recorded


class Memory:
    """Where a stand-in for a device array lies."""

    def __init__(self, ptr: int, device_id: int) -> None:
        self.ptr, self.device_id = ptr, device_id


class DeviceArray:
    """What launch() looks at in an array."""

    def __init__(self, shape, dtype, *, ptr=4096, device=0, contiguous=True):
        host = np.empty(shape, dtype)
        self.shape, self.dtype, self.itemsize = host.shape, host.dtype, host.itemsize
        self.strides = host.strides if contiguous else tuple(2 * s for s in host.strides)
        self.data = Memory(ptr, device)
        self._c_contiguous = contiguous
        self.flags = type("Flags", (), {"c_contiguous": contiguous})


KERNEL = launch.Kernel(
    "norm.cu", "layer_norm", "x: float32[N,C], w: ELEM[C]?, out: ELEM[N,C], eps: float, N, C"
)


@pytest.fixture
def launched(monkeypatch):
    """The launches that got past the checks: (grid, block, values)."""
    calls = []
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(
        launch, "_function", lambda *key: lambda *call, shared_mem: calls.append(call)
    )
    return calls


def try_launch(**changed):
    half = np.dtype(np.float16)
    arrays = {
        "x": DeviceArray((3, 8), np.float32),
        "w": DeviceArray((8,), half),
        "out": DeviceArray((3, 8), half),
    } | changed
    launch.launch(KERNEL, (1,), (32,), (*arrays.values(), 1e-5), elem=half)


def test_what_is_recorded_is_compiled_meanwhile_and_loaded_when_it_is_needed(launched, monkeypatch):
    """So that the kernels of a step are compiled side by side, and not each before the next."""
    requested, loaded, function = [], [], launch._function
    monkeypatch.setattr(launch, "device_arch", lambda device: "sm_90")
    monkeypatch.setattr(launch.compiler, "request", lambda *given: requested.append(given))
    monkeypatch.setattr(launch, "_function", lambda *key: loaded.append(key) or function(*key))
    launch._requested.cache_clear()
    with recorded() as calls:
        try_launch()
        try_launch()
    assert requested == [("norm.cu", {"ELEM": "__half"}, "sm_90")], "once for all launches of it"
    assert len(calls) == 2 and not loaded and not launched
    calls[0]()
    assert len(loaded) == len(launched) == 1, "it also runs without load()"
    load(calls)
    assert len(loaded) == 3 and len(launched) == 1
    for call in calls:
        call()
    assert len(loaded) == 3 and len(launched) == 3
    launch._requested.cache_clear()


def test_scalars_are_cast_and_letters_bound(launched):
    try_launch()
    (_, _, values), *_ = launched
    assert [type(value) for value in values[3:]] == [np.float32, np.int32, np.int32]
    assert values[4:] == (3, 8)
    try_launch(w=None)
    assert launched[-1][2][1] == launch.NULL


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"x": DeviceArray((3, 8), np.float64)}, r"x is float64\[3, 8\].*float32\[N, C\]"),
        ({"w": DeviceArray((8,), np.float32)}, r"w is float32\[8\].*float16\[C=8\]"),
        ({"w": DeviceArray((9,), np.float16)}, r"w is float16\[9\].*float16\[C=8\]"),
        ({"out": DeviceArray((2, 8), np.float16)}, r"out is float16\[2, 8\].*\[N=3, C=8\]"),
        ({"out": DeviceArray((24,), np.float16)}, r"out is float16\[24\].*\[N=3, C=8\]"),
        ({"x": DeviceArray((3, 8), np.float32, contiguous=False)}, "not contiguous"),
        ({"x": DeviceArray((3, 8), np.float32, device=1)}, "on device 1 .* on device 0"),
        ({"x": DeviceArray((3, 8), np.float32, ptr=4100)}, "aligned to 16 bytes"),
    ],
)
def test_launch_refuses(launched, changed, says):
    with pytest.raises(InputError, match=says) as caught:
        try_launch(**changed)
    assert "norm.cu: layer_norm" in str(caught.value) and caught.value.remedy
    assert launched == []


def test_rows_that_cannot_be_aligned_are_taken(launched):
    half = np.dtype(np.float16)
    odd = {"x": DeviceArray((3, 7), np.float32, ptr=4), "w": None}
    try_launch(**odd, out=DeviceArray((3, 7), half, ptr=14))
    assert len(launched) == 1


@pytest.mark.parametrize(
    "source, elem, head_size, says",
    [
        ("norm.cu", np.dtype(np.float64), None, "float64"),
        ("attention_decode.cu", np.dtype(np.float16), 129, "129"),
        ("attention_decode.cu", np.dtype(np.float16), 0, "up to 128"),
    ],
)
def test_what_no_kernel_is_compiled_for_is_refused(source, elem, head_size, says):
    with pytest.raises(InputError, match=says) as caught:
        launch.Kernel(source, "entry", "N").defines(elem, head_size, None)
    assert caught.value.where == source and caught.value.remedy
