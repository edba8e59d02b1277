"""A stand-in for CuPy: machines with any GPUs, driver and packages, as far as loading looks."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from collections.abc import Callable, Iterator

import pytest

from gpt2cupy.ops.core import device as device_module

PACKAGES = device_module._PACKAGES


class CUDARuntimeError(RuntimeError):
    """As CuPy's: it knows CUDA's number of the error."""

    def __init__(self, status: int) -> None:
        super().__init__(f"cudaError{status}")
        self.status = status


class CUDADriverError(CUDARuntimeError):
    """As CuPy's, of the driver's own interface."""


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class Device:
    """A GPU as far as loading looks at it."""

    capability = "90"
    waits = 0  # how often a synchronization was asked for

    def __init__(self, index: int) -> None:
        self.id = index
        self.compute_capability = self.capability

    def __enter__(self) -> Device:
        return self

    def synchronize(self) -> None:
        type(self).waits += 1

    def __exit__(self, *exception: object) -> None: ...


def refuse(*args, **kwargs):
    raise OutOfMemoryError("no room for 123 bytes")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., types.ModuleType]]:
    """The body of the fixture ``machine``."""

    def make(gpus=1, capability="90", status=None, driver=13000):
        def count():
            if status is not None:
                raise CUDARuntimeError(status)
            return gpus

        cupy = types.ModuleType("cupy")
        cupy.ndarray = types.new_class("ndarray")
        cupy.zeros = refuse
        pool = types.SimpleNamespace(free_all_blocks=lambda: None)
        cupy.get_default_memory_pool = cupy.get_default_pinned_memory_pool = lambda: pool
        cupy.cuda = types.SimpleNamespace(
            Device=type("Device", (Device,), {"capability": capability}),
            driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            runtime=types.SimpleNamespace(
                CUDARuntimeError=CUDARuntimeError,
                getDeviceCount=count,
                driverGetVersion=lambda: driver,
                getDeviceProperties=lambda index: {"name": b"Some GPU"},
            ),
        )
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return cupy

    packages(monkeypatch, "cupy-cuda12x")
    device_module.device_arch.cache_clear()
    yield make
    device_module.device_arch.cache_clear()
    device_module.cupy_packages.cache_clear()


def packages(monkeypatch, *names):
    """Of the packages that bring CuPy, only these are installed."""
    real = importlib.metadata.distribution

    def distribution(name):
        if name in names:
            return name
        if name in PACKAGES:
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    device_module.cupy_packages.cache_clear()
