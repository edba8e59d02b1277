"""A stand-in for CuPy's driver: arrays that lie nowhere, and what reaches cuLaunchKernel."""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest

from gpt2cupy.ops.core import driver, launch, plan
from gpt2cupy.ops.core.tape import Launch


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
        self.size, self.nbytes, self.ndim = host.size, host.nbytes, host.ndim

    def view(self):
        """Another array over the same memory."""
        same = DeviceArray.__new__(DeviceArray)
        same.__dict__ |= self.__dict__
        return same

    def __len__(self):
        return self.shape[0]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.SimpleNamespace]:
    """The body of a fixture: what was seen so far.

    ``calls`` are (function, sizes, stream, the first eight values, which a kernel must have)
    that reached the driver, ``checked`` the functions that were looked for; ``device`` is the
    current one. Where it is ``programmatic``, ``overlapped`` counts launches that may overlap
    their predecessor, which return ``error``.
    """
    seen = types.SimpleNamespace(
        calls=[], checked=[], device=0, programmatic=False, overlapped=0, error=0
    )

    def start(function, *rest):
        *sizes, stream, addresses, _ = rest
        places = np.ctypeslib.as_array((ctypes.c_uint64 * 8).from_address(addresses))
        values = [ctypes.c_uint64.from_address(int(place)).value for place in places]
        seen.calls.append((function, tuple(sizes), stream, values))

    cupy = types.ModuleType("cupy")
    cupy.ndarray = DeviceArray
    cupy.cuda = types.SimpleNamespace(
        driver=types.SimpleNamespace(launchKernel=start, CUDADriverError=RuntimeError),
        runtime=types.SimpleNamespace(getDevice=lambda: seen.device),
        get_current_stream=lambda device=0: types.SimpleNamespace(ptr=70 + device),
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)

    def function(*key):
        seen.checked.append(key)
        run = lambda *call, shared_mem: None  # noqa: E731
        run.kernel = types.SimpleNamespace(ptr=123)
        return run

    def start_programmatic(config, function, addresses, extra):
        *sizes, stream, attribute, count = driver._CONFIG.unpack(ctypes.string_at(config, 56))
        assert count == 1
        assert driver._ATTRIBUTE.unpack(ctypes.string_at(attribute, 72)) == (6, 1)
        start(function, *sizes, stream, addresses, 0)
        seen.overlapped += 1
        return seen.error

    monkeypatch.setattr(driver, "_launch", lambda: start_programmatic)
    monkeypatch.setattr(plan, "has_programmatic_launch", lambda device: seen.programmatic)
    monkeypatch.setattr(launch, "_function", function)
    monkeypatch.setattr(launch, "_requested", function)
    plans = launch.THREAD.known, launch.THREAD.plans
    launch.THREAD.known, launch.THREAD.plans = {}, {}
    yield seen
    launch.THREAD.known, launch.THREAD.plans = plans


def call(arrays: list[DeviceArray], pairs: tuple = ()) -> Launch:
    """A launch that takes these arrays."""
    function = types.SimpleNamespace(kernel=types.SimpleNamespace(ptr=123))
    return Launch(function, (1,), (32,), tuple(arrays), pairs=pairs)
