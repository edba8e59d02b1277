"""Calls of cuBLASLt among the launches of a plan, on stand-ins for arrays, driver and library."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types

import fake_driver
import numpy as np
import pytest
from fake_driver import DeviceArray

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops.core import blas, blas_product
from gpt2cupy.ops.core.launch import THREAD
from gpt2cupy.ops.core.plan import Plan, can_be_planned, places_of
from gpt2cupy.ops.core.tape import recorded

HALF = np.dtype(np.float16)
ROWS, M, K = 300, 64, 32
APART = 1 << 20


@pytest.fixture
def driver(monkeypatch):
    for module in ("launch", "planned", "blas", "device"):
        monkeypatch.setattr(f"gpt2cupy.ops.core.{module}.current_device", lambda: 0)
    monkeypatch.setattr("gpt2cupy.ops.linear_split.current_device", lambda: 0)
    monkeypatch.setattr("gpt2cupy.ops.linear_split.device_arch", lambda device: "sm_90")
    monkeypatch.setattr("gpt2cupy.ops.core.device.device_arch", lambda device: "sm_90")
    monkeypatch.setattr("gpt2cupy.ops.core.device._sm_count", lambda device: 132)
    monkeypatch.setattr(blas, "handles", lambda device: None)
    monkeypatch.setattr(blas_product, "current_stream", lambda: 70)
    for seen in fake_driver.stand_in(monkeypatch):
        seen.queued, seen.turns = [], 0
        sys.modules["cupy"].cuda.driver.launchKernel = lambda *given: None

        @contextlib.contextmanager
        def workspace(seen=seen):
            seen.turns += 1
            yield

        def product(*problem, seen=seen):
            def queue(own, pointers, memory, stream):
                seen.queued.append((problem[1:4], list(pointers), memory, stream))

            return types.SimpleNamespace(queue=queue)

        monkeypatch.setattr(blas_product, "workspace", workspace)
        monkeypatch.setattr(blas, "_product", product)
        yield seen


def arrays(**changed):
    shapes = {"x": (ROWS, K), "weight": (M, K), "bias": (M,), "out": (ROWS, M)}
    made = {
        name: DeviceArray(shape, HALF, ptr=(place + 1) * APART)
        for place, (name, shape) in enumerate(shapes.items())
    }
    return made | changed


def test_a_product_is_found_again_with_other_pointers(driver):
    first, second = arrays(), arrays(x=DeviceArray((ROWS, K), HALF, ptr=9 * APART), bias=None)
    third = arrays(x=DeviceArray((ROWS, K), HALF, ptr=7 * APART))
    for given in (first, third, second):
        assert ops.linear(**given) is given["out"]
    problem = (ROWS, M, K)
    assert driver.queued == [
        (problem, [APART, 2 * APART, 3 * APART, 0, 4 * APART], None, 70),
        (problem, [7 * APART, 2 * APART, 3 * APART, 0, 4 * APART], None, 70),
        (problem, [9 * APART, 2 * APART, 0, 0, 4 * APART], None, 70),
    ]
    assert driver.turns == 3 and len(THREAD.plans) == 2


def test_an_output_over_an_input_is_refused_at_every_call(driver):
    ops.linear(**arrays())
    for name, shape in (("x", (ROWS, K)), ("weight", (M, K)), ("bias", (M,))):
        there = arrays()
        there[name] = DeviceArray(shape, HALF, ptr=4 * APART + 16)
        with pytest.raises(InputError, match=f"out shares memory with {name}"):
            ops.linear(**there)
    residual = arrays()
    residual["residual"] = residual["out"]
    ops.linear(**residual)
    assert driver.queued[-1][1] == [APART, 2 * APART, 3 * APART, 4 * APART, 4 * APART]
    residual["residual"] = DeviceArray((ROWS, M), HALF, ptr=4 * APART + 16)
    with pytest.raises(InputError, match="out shares memory with residual"):
        ops.linear(**residual)


def test_a_residual_that_becomes_the_output_is_not_overwritten_by_a_plan(driver, monkeypatch):
    """With an activation the residual is added by a kernel after the product."""
    spare = DeviceArray((ROWS, M), HALF, ptr=8 * APART)
    module = importlib.import_module("gpt2cupy.ops.linear")  # ops has a function of this name
    monkeypatch.setattr(module, "device_empty", lambda shape, dtype: spare)
    apart = arrays(residual=DeviceArray((ROWS, M), HALF, ptr=6 * APART))
    for _ in range(2):
        ops.linear(**apart, activation="silu")
    assert [queued[1][4] for queued in driver.queued] == [4 * APART] * 2
    ops.linear(**apart | {"residual": apart["out"]}, activation="silu")
    assert driver.queued[-1][1][4] == 8 * APART, "a product of its own"


def test_a_caller_with_memory_takes_no_turns(driver):
    memory = DeviceArray((blas.WORKSPACE,), np.uint8, ptr=32 * APART)
    given = arrays()
    everything = [*given.values(), memory]
    with recorded() as calls, blas.working_in(memory):
        ops.linear(**given)
    assert all(map(can_be_planned, calls))
    places = places_of(calls, everything)
    assert places == [[0, 1, 2, 5, 3, 4, 5]]
    plan = Plan(calls, places, len(everything) + 1, 0)
    pointers = tuple((place + 40) * APART for place in range(5))
    assert plan.admits((*pointers, 0))
    assert not plan.admits((pointers[3] + 32, *pointers[1:], 0)), "x in out"
    assert not plan.admits((*pointers[:3], pointers[4], pointers[4], 0)), "out in the memory"
    plan.run_on(99, (*pointers, 0))
    x, weight, bias, out, at = pointers
    assert driver.queued == [((ROWS, M, K), [x, weight, bias, 0, out], at, 99)]
    assert driver.turns == 0
    with recorded() as calls, blas.working_in(DeviceArray((0,), np.uint8)):
        ops.linear(**given)
    assert calls[0].values[5] is None


class Reshaped(DeviceArray):
    """An array that can be seen under another shape, as CuPy's."""

    base = None

    def reshape(self, *shape):
        made = Reshaped(shape, self.dtype, ptr=self.data.ptr)
        made.base = self if self.base is None else self.base
        return made

    def view(self):
        return self.reshape(*self.shape)


def test_rows_of_more_dimensions_are_found_again_where_it_is_clear_what_they_are(driver):
    def given(**pointers):
        made = {name: Reshaped((2, 150, M), HALF, ptr=p * APART) for name, p in pointers.items()}
        return arrays(x=Reshaped((2, 150, K), HALF, ptr=APART)) | made

    for out in (4, 5):
        ops.linear(**given(out=out))
    assert [queued[1][4] for queued in driver.queued] == [4 * APART, 5 * APART]
    assert [type(plan) for plan in THREAD.plans.values()] == [Plan]
    # The residual is the output: the launch has two views of the same memory.
    together = given(out=4)
    together["residual"] = together["out"]
    ops.linear(**together)
    ops.linear(**given(out=6, residual=7))
    assert [queued[1][3:] for queued in driver.queued[2:]] == [
        [4 * APART, 4 * APART],
        [7 * APART, 6 * APART],
    ]
