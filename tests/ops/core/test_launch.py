"""The launcher, as far as it goes without a GPU: what it checks, casts and refuses."""

from __future__ import annotations

import threading

import fake_driver
import numpy as np
import pytest
from fake_driver import DeviceArray

from gpt2cupy.errors import InputError
from gpt2cupy.ops.core import launch
from gpt2cupy.ops.core.tape import load, recorded

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


# -- launches that are found again ---------------------------------------------------------------


IN_PLACE = launch.Kernel(
    "rms_norm.cu",
    "rms_norm",
    "x: ELEM[*N,C], w: ELEM[C]?, out: ELEM[*N,C]~, eps: float, N, C, x_stride, out_stride",
)


@pytest.fixture
def driver(monkeypatch):
    yield from fake_driver.stand_in(monkeypatch)


def in_place(eps=1e-5, grid=(2,), **changed):
    half = np.dtype(np.float16)
    arrays = {
        "x": DeviceArray((2, 3, 8), half, ptr=4096),
        "w": DeviceArray((8,), half, ptr=8192),
        "out": DeviceArray((2, 3, 8), half, ptr=16384),
    } | changed
    launch.launch(IN_PLACE, grid, (32,), (*arrays.values(), eps), elem=half)


def test_a_launch_is_checked_once_and_then_only_its_pointers_change(driver):
    in_place()
    assert len(driver.checked) == 1 and not driver.calls, "the first goes by CuPy"
    in_place(x=DeviceArray((2, 3, 8), np.float16, ptr=32768))
    in_place(w=None)
    in_place(w=None)
    assert len(driver.checked) == 2, "None is another signature"
    (first, second) = driver.calls
    assert first[:3] == second[:3] == (123, (2, 1, 1, 32, 1, 1, 0), 70)
    eps = int(np.float32(1e-5).view(np.uint32))
    assert first[3] == [32768, 8192, 16384, eps, 6, 8, 8, 8]
    assert second[3] == [4096, 0, 16384, eps, 6, 8, 8, 8]


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"x": DeviceArray((2, 3, 8), np.float16, contiguous=False)}, "not contiguous"),
        ({"x": DeviceArray((2, 3, 8), np.float16, ptr=4104)}, "aligned to 16 bytes"),
        ({"x": DeviceArray((2, 3, 8), np.float16, device=1)}, "on device 1 .* on device 0"),
        ({"x": DeviceArray((2, 3, 8), np.float32)}, "x is float32"),
        ({"w": DeviceArray((9,), np.float16)}, r"w is float16\[9\]"),
        ({"out": DeviceArray((2, 2, 8), np.float16)}, r"out is float16\[2, 2, 8\]"),
        ({"out": DeviceArray((2, 3, 8), np.float16, ptr=4112)}, "out shares memory with x"),
        ({"out": DeviceArray((2, 3, 8), np.float16, ptr=8192 - 32)}, "out shares memory with w"),
        ({"x": np.zeros((2, 3, 8), np.float16)}, "x is a numpy.ndarray, not an array on the GPU"),
    ],
)
def test_arguments_that_changed_are_still_refused(driver, changed, says):
    in_place()
    in_place()
    with pytest.raises(InputError, match=says) as caught:
        in_place(**changed)
    assert "rms_norm.cu: rms_norm" in str(caught.value) and caught.value.remedy
    assert len(driver.calls) == 1


def test_an_output_may_be_the_input_itself(driver):
    same = DeviceArray((2, 3, 8), np.float16, ptr=4096)
    for _ in range(3):
        in_place(x=same, out=same)
    assert len(driver.checked) == 1 and len(driver.calls) == 2


def test_other_scalars_and_sizes_are_other_launches(driver):
    for eps, grid in ((1e-5, (2,)), (1e-6, (2,)), (1e-5, (3,))):
        in_place(eps=eps, grid=grid)
    assert len(driver.checked) == 3 and not driver.calls
    in_place(grid=(0,))
    assert len(driver.checked) == 4, "nothing to do is checked too, and not launched"
    assert not driver.calls


def test_each_thread_checks_for_itself(driver):
    in_place()
    thread = threading.Thread(target=in_place)
    thread.start()
    thread.join()
    assert len(driver.checked) == 2
