"""Calls of ops that are found again as a whole: the same launches, and nothing less is refused."""

from __future__ import annotations

import ctypes
import threading

import fake_driver
import numpy as np
import pytest
from fake_driver import DeviceArray
from hypothesis import given
from hypothesis import strategies as st

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import norm
from gpt2cupy.ops.core import driver as core_driver
from gpt2cupy.ops.core import plan, planned, registry, tensor_map
from gpt2cupy.ops.core.launch import THREAD, Kernel, device_empty, launch
from gpt2cupy.ops.core.overlap import meet, neighbours
from gpt2cupy.ops.core.registry import op
from gpt2cupy.ops.core.signature import parse
from gpt2cupy.ops.core.tape import NO_PLANS, recorded

HALF = np.dtype(np.float16)
DOUBLE = Kernel(
    "toy.cu",
    "double",
    "x: ELEM[*N,C], out: ELEM[*N,C]~, a: int, b: int, N, C, x_stride, out_stride",
)


@pytest.fixture
def driver(monkeypatch):
    monkeypatch.setattr("gpt2cupy.ops.core.launch.current_device", lambda: seen.device)
    monkeypatch.setattr("gpt2cupy.ops.core.planned.current_device", lambda: seen.device)
    for seen in fake_driver.stand_in(monkeypatch):
        yield seen


def rms_norm(eps=1e-6, out_shape=(2, 3, 8), **changed):
    arrays = {
        "x": DeviceArray((2, 3, 8), HALF, ptr=4096),
        "w": DeviceArray((8,), HALF, ptr=8192),
        "out": DeviceArray(out_shape, HALF, ptr=16384),
    } | changed
    return ops.rms_norm(arrays["x"], arrays["w"], eps, out=arrays["out"])


def test_a_call_is_checked_once_and_then_only_its_pointers_change(driver):
    out = DeviceArray((2, 3, 8), HALF, ptr=1 << 20)
    assert rms_norm() is not out and not driver.calls, "the first goes by CuPy"
    assert rms_norm(x=DeviceArray((2, 3, 8), HALF, ptr=32768), out=out) is out
    assert rms_norm(w=None) and rms_norm(w=None)
    assert len(driver.checked) == 2, "None is another call"
    first, second = driver.calls
    assert first[:3] == (123, (2, 1, 1, 32, 4, 1, 0), 70)
    eps = int(np.float32(1e-6).view(np.uint32))
    assert first[3] == [32768, 8192, 1 << 20, eps, 6, 8, 8, 8]
    assert second[3] == [4096, 0, 16384, eps, 6, 8, 8, 8]


def test_tensor_maps_are_made_anew_where_an_array_lies_elsewhere(driver, monkeypatch):
    made = []

    def encoded(pointer, *rest):
        made.append((pointer, rest))
        return pointer.to_bytes(8, "little") + bytes(120)

    monkeypatch.setattr(tensor_map, "_encoded", encoded)
    kernel = Kernel(
        "toy.cu",
        "turned",
        "x: ELEM[B,T,H,C]@, out: ELEM[B,T,H,C]!@, a: int, B, T, x_stride_T, x_stride_H, "
        "x_tiles: tiles[x,128]",
    )
    assert kernel.tiles_of == (0,)
    shape = (1, 256, 3, 64)
    for ptr in (4096, 1 << 20, 4096):
        arrays = DeviceArray(shape, HALF, ptr=ptr), DeviceArray(shape, HALF, ptr=1 << 24)
        launch(kernel, (2,), (32,), (*arrays, 7), elem=HALF)
    values = [values for *_, values in driver.calls]
    low = [[int(value) & 0xFFFFFFFF for value in each] for each in values]
    for ptr, each in zip((4096, 1 << 20, 4096), low, strict=True):
        assert each == [ptr, 1 << 24, 7, 1, 256, 192, 64, ptr]
    # Strides of a dimension with one element are not those of the array, which may be anything.
    assert made[0] == (4096, ("float16", shape, (128, 384, 128, 2), 128))
    assert {call[:3] for call in driver.calls} == {(123, (2, 1, 1, 32, 1, 1, 0), 70)}


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"x": DeviceArray((2, 3, 8), HALF, contiguous=False)}, "not contiguous"),
        ({"x": DeviceArray((2, 3, 8), HALF, ptr=4104)}, "aligned to 16 bytes"),
        ({"x": DeviceArray((2, 3, 8), HALF, device=1)}, "on device 1 .* on device 0"),
        ({"x": DeviceArray((2, 3, 8), np.float64)}, "x is float64"),
        ({"w": DeviceArray((9,), HALF)}, r"weight is float16\[9\]"),
        ({"out": DeviceArray((2, 2, 8), HALF)}, r"out is float16\[2, 2, 8\]"),
        ({"out": DeviceArray((2, 3, 8), HALF, ptr=4112)}, "out shares memory with x"),
        ({"out": DeviceArray((2, 3, 8), HALF, ptr=8192 - 32)}, "out shares memory with weight"),
        ({"w": np.zeros(8, HALF)}, "weight is a numpy.ndarray, not an array on the GPU"),
    ],
)
def test_arguments_that_changed_are_still_refused(driver, changed, says):
    for _ in range(3):
        rms_norm()
    with pytest.raises(InputError, match=says) as caught:
        rms_norm(**changed)
    assert caught.value.where and caught.value.remedy
    assert len(driver.calls) == 2


def test_another_current_device_is_refused(driver):
    for _ in range(2):
        rms_norm()
    driver.device = 1
    with pytest.raises(InputError, match=r"on device 0 .* on device 1"):
        rms_norm()


def test_an_array_that_was_given_twice_may_be_two_the_next_time(driver):
    same = DeviceArray((2, 3, 8), HALF, ptr=4096)
    assert rms_norm(x=same, out=same) is same
    rms_norm()
    assert driver.calls[-1][3][:3] == [4096, 8192, 16384]
    y, total = (DeviceArray((1, 8), HALF, ptr=p) for p in (1 << 16, 1 << 17))
    x, residual, w = (DeviceArray(s, HALF, ptr=p) for s, p in (((1, 8), 1), ((1, 8), 2), (8, 3)))
    for array in (x, residual, w):
        array.data.ptr <<= 14
    assert ops.add_rms_norm(residual, residual, w, out=(y, residual)) == (y, residual)
    assert ops.add_rms_norm(x, residual, w, out=(y, total)) == (y, total)
    assert driver.calls[-1][3][:5] == [1 << 14, 2 << 14, 1 << 17, 3 << 14, 1 << 16]


def test_one_of_two_outputs_is_made(driver, monkeypatch):
    made = DeviceArray((1, 8), HALF, ptr=1 << 18)
    monkeypatch.setattr(norm, "device_empty", lambda shape, dtype: made)
    x, residual, y = (DeviceArray((1, 8), HALF, ptr=p << 14) for p in (1, 2, 4))
    for _ in range(3):
        assert ops.add_rms_norm(x, residual, None, out=(y, None)) == (y, made)
    assert not THREAD.plans


def test_a_kernel_that_waits_first_may_overlap_what_precedes_it(driver):
    driver.programmatic = True
    for ptr in (1 << 14, 1 << 15, 1 << 16):
        rms_norm(out=DeviceArray((2, 3, 8), HALF, ptr=ptr))
    assert driver.overlapped == len(driver.calls) == 2
    first, second = driver.calls
    assert first[:3] == second[:3] == (123, (2, 1, 1, 32, 4, 1, 0), 70)
    assert (first[3][2], second[3][2]) == (1 << 15, 1 << 16)
    driver.error = 700
    with pytest.raises(RuntimeError, match="700"):
        rms_norm()


def test_the_drivers_structs_are_those_of_its_header():
    bindings = pytest.importorskip("cuda.bindings.driver")
    ident = bindings.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert ident == core_driver._PROGRAMMATIC_STREAM_SERIALIZATION
    attribute, config = bindings.CUlaunchAttribute(), bindings.CUlaunchConfig()
    attribute.id, attribute.value.programmaticStreamSerializationAllowed = ident, 1
    sizes = dict(zip(("gridDim", "blockDim"), ((2, 3, 4), (5, 6, 7)), strict=True))
    for name, each in sizes.items():
        for axis, size in zip("XYZ", each, strict=True):
            setattr(config, name + axis, size)
    config.sharedMemBytes, config.hStream, config.attrs, config.numAttrs = 8, 9, [attribute], 1
    raw = ctypes.string_at(config.getPtr(), core_driver._CONFIG.size)
    *found, attributes, count = core_driver._CONFIG.unpack(raw)
    assert found == [2, 3, 4, 5, 6, 7, 8, 9] and count == 1
    assert raw[core_driver._STREAM_AT] == 9
    raw = ctypes.string_at(attributes, core_driver._ATTRIBUTE.size)
    assert core_driver._ATTRIBUTE.unpack(raw) == (ident, 1)


def test_nothing_is_found_while_calls_are_recorded_or_observed(driver):
    rms_norm()
    with recorded() as calls:
        rms_norm()
    assert len(calls) == 1 and not driver.calls
    seen = []

    def callback(op_, args, options):
        seen.append(op_.__name__)
        return op_(*args, **options)

    with registry.observed(callback):
        assert THREAD.plans is NO_PLANS
        for _ in range(3):
            rms_norm()
    assert seen == ["rms_norm"] * 3
    before = len(driver.calls)
    rms_norm()
    assert len(driver.calls) == before + 1


def test_an_op_that_makes_an_array_is_never_planned(driver, monkeypatch):
    monkeypatch.setattr(registry, "registered", {})

    def double(x: Array, *, out: Array | None = None) -> Array:  # noqa: F821
        between = device_empty(x.shape, x.dtype)
        launch(DOUBLE, (1,), (32,), (x, between, 1, 2), elem=x.dtype)
        launch(DOUBLE, (1,), (32,), (between, out, 1, 2), elem=x.dtype)
        return out

    monkeypatch.setitem(
        double.__globals__,
        "device_empty",
        lambda shape, dtype: DeviceArray(shape, dtype, ptr=1 << 20),
    )
    twice = op(reference=None, only_launches=True)(double)
    x, out = DeviceArray((1, 8), HALF, ptr=1 << 14), DeviceArray((1, 8), HALF, ptr=1 << 15)
    for _ in range(3):
        assert twice(x, out=out) is out
    assert list(THREAD.plans.values()) == [planned._UNPLANNED]
    # Each launch is found again by itself.
    assert [values[:2] for *_, values in driver.calls[-2:]] == [
        [1 << 14, 1 << 20],
        [1 << 20, 1 << 15],
    ]


def test_settings_that_cannot_be_looked_up(driver):
    with pytest.raises((InputError, TypeError)):
        rms_norm(eps=[1e-6])
    assert not THREAD.plans


def test_nothing_to_do_is_checked_too(driver):
    nothing = {name: DeviceArray((0, 8), HALF, ptr=0) for name in ("x", "out")}
    for _ in range(3):
        assert rms_norm(**nothing) is nothing["out"]
    assert not driver.calls
    with pytest.raises(InputError, match="weight is"):
        rms_norm(**nothing, w=DeviceArray((9,), HALF, ptr=4096))


def test_each_thread_has_plans_of_its_own(driver):
    rms_norm()
    threads = [threading.Thread(target=rms_norm) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert len(driver.checked) == 3


def test_a_thread_forgets_when_it_knows_too_many(driver, monkeypatch):
    monkeypatch.setattr(plan, "_KNOWN", 3)
    monkeypatch.setattr(plan, "_CHECKED", 2)
    for eps in range(7):
        rms_norm(eps=float(eps))
    assert len(THREAD.plans) == 1
    for place in range(1, 8):
        rms_norm(eps=6.0, out=DeviceArray((2, 3, 8), HALF, ptr=place << 14))
    (kept,) = THREAD.plans.values()
    assert len(kept.checked) <= 2 and len(driver.calls) == 7


@given(pointers=st.tuples(*[st.integers(0, 24)] * 3), rows=st.integers(1, 3))
def test_pointers_are_admitted_where_all_checks_pass(pointers, rows):
    parameters = tuple(
        map(
            parse,
            ("x: float16[*N,C]", "w: float16[C]", "out: float16[*N,C]~", "N", "C", "x_stride"),
        )
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        for _ in fake_driver.stand_in(monkeypatch):
            shapes = (rows, 8), (8,), (rows, 8)
            arrays = [DeviceArray(shape, HALF, ptr=4096) for shape in shapes]
            pairs = neighbours(parameters, tuple(arrays))
            call = fake_driver.call(arrays, pairs)
            found = plan.Plan([call], [range(3)], 3, 0)
            given_ = tuple(8 * pointer for pointer in pointers)
            expected = all(p % 16 == 0 for p in given_) and not any(
                meet(pair, given_[pair.written] - given_[pair.other]) for pair in pairs
            )
            assert found.admits(given_) == found.admits(given_) == expected
