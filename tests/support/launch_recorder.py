"""A plugin of pytest: GPU tests without a GPU, which only say what kernels they launch.

    PYTHONPATH=tests python -m pytest -p launch_recorder --launched FILE IDS...

CuPy's arrays are NumPy's, checked by ``launch()`` as ever; kernels compute nothing, so
comparisons are left out. FILE gets a line "source entry" for every kernel launched.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

launched: set[str] = set()


class Array(np.ndarray):
    """What ops take for a GPU's array."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data, device_id=0)

    @property
    def _c_contiguous(self):
        return self.flags.c_contiguous

    def get(self):
        return np.asarray(self)


class Pinned(bytearray):
    """Memory that is copied from; nothing is."""

    ptr = 0


class Cupy(types.ModuleType):
    """NumPy's functions, whose arrays are :class:`Array`; what is new is zero."""

    ndarray = Array

    def empty(self, shape, dtype):
        return self.zeros(shape, dtype)

    def __getattr__(self, name):
        value = getattr(np, name)
        if isinstance(value, type) or not callable(value):
            return value
        return lambda *args, **options: value(*args, **options).view(Array)


def _cupy() -> Cupy:
    cupy = Cupy("cupy")
    cupy.cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            getDevice=lambda: 0,
            getDeviceCount=lambda: 1,
            CUDARuntimeError=RuntimeError,
            memcpyAsync=lambda *args: None,
        ),
        alloc_pinned_memory=Pinned,
        Event=lambda **options: SimpleNamespace(synchronize=int, record=id),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
    )
    return cupy


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--launched", required=True, help="where to list the kernels")


def pytest_configure(config: pytest.Config) -> None:
    sys.modules["cupy"] = _cupy()
    from gpt2cupy.ops.core import blas, device, launch, tape

    device.cupy_packages = lambda: ("cupy",)
    device.device_arch = launch.device_arch = lambda index: "sm_90"
    device._sm_count, device._shared_limit = lambda index: 132, lambda index: 227 << 10
    blas.gemv = blas.matmul = lambda *args, **options: None

    def function(device, kernel, *sizes):
        launched.add(f"{kernel.source} {kernel.entry}")
        return lambda *args, **options: None

    launch._function = launch._requested = function
    tape.Launch.by_driver = lambda self: None
    import error_rule

    error_rule.check = np.testing.assert_array_equal = lambda *args, **options: None
    np.testing.assert_allclose = np.testing.assert_array_equal
    import op_checks

    from gpt2cupy.ops import reference

    # What is launched depends on no value.
    op_checks.SEEDS = range(1)
    reference.product = lambda x, weight, invariant=False: np.zeros(
        (len(x), len(weight)), np.float32
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    lines = [f"{line}\n" for line in sorted(launched)]
    Path(config.getoption("--launched")).write_text("".join(lines), encoding="utf-8")
