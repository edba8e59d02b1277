"""Checked launches as objects: run at once, collected for a decoder, or captured with overlap."""

from __future__ import annotations

import contextlib
import functools
import struct
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np


class _Thread(threading.local):
    """What belongs to one thread: the tape being recorded, and launches known by their facts."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] | None = None
        self.known: dict[tuple[Any, ...], Prepared] = {}


THREAD = _Thread()


class Later:
    """A kernel that may still be compiled while launches of it are recorded.

    Parameters
    ----------
    load : callable
        Waits for the compiler and returns the loaded cupy.RawKernel.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load

    def __call__(self, *args: Any, **options: Any) -> None:
        self.load()(*args, **options)


class Launch:
    """A kernel with its grid and its checked, cast arguments.

    Parameters
    ----------
    function : cupy.RawKernel or Later
    grid, block : tuple of int
    values : tuple
        CuPy arrays and NumPy scalars, as the kernel takes them.
    overlaps : bool
        Whether the kernel waits for its predecessor by itself, so that it may
        start before that one ends (``griddepcontrol_wait`` in common.cuh).
    shared : int
        Bytes of dynamic shared memory of a block.
    writes_weights : bool
        Whether no kernel may start before it ends: it writes what others load before they
        wait.
    """

    def __init__(
        self,
        function: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        values: tuple[Any, ...],
        overlaps: bool = False,
        shared: int = 0,
        writes_weights: bool = False,
    ) -> None:
        self.function = function
        self.grid = grid
        self.block = block
        self.values = values
        self.overlaps = overlaps
        self.shared = shared
        self.writes_weights = writes_weights

    def load(self) -> None:
        """Wait for the kernel if it is still being compiled, and load it."""
        if isinstance(self.function, Later):
            self.function = self.function.load()

    def __call__(self) -> None:
        self.function(self.grid, self.block, self.values, shared_mem=self.shared)

    def overlapped(self) -> None:
        """Launch it so that it may start while its predecessor still runs.

        CuPy has no launch attributes, so this goes through the driver.
        """
        import cupy
        from cuda.bindings import driver

        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = (*self.grid, 1, 1)[:3]
        config.blockDimX, config.blockDimY, config.blockDimZ = (*self.block, 1, 1)[:3]
        config.sharedMemBytes = self.shared
        config.hStream = cupy.cuda.get_current_stream().ptr
        attribute = driver.CUlaunchAttribute()
        serialization = (
            driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        )
        attribute.id = serialization
        attribute.value.programmaticStreamSerializationAllowed = 1
        config.attrs, config.numAttrs = [attribute], 1
        cells = [
            np.array([value.data.ptr if isinstance(value, cupy.ndarray) else value])
            for value in self.values
        ]
        addresses = np.array([cell.ctypes.data for cell in cells], np.uintp)
        (error,) = driver.cuLaunchKernelEx(
            config, self.function.kernel.ptr, addresses.ctypes.data, 0
        )
        if error != driver.CUresult.CUDA_SUCCESS:
            raise cupy.cuda.driver.CUDADriverError(int(error))


class Prepared:
    """A checked launch to be run again with other pointers, past CuPy's handling of arguments.

    CuPy makes an object of every argument of every call. Here all of them lie in memory
    once, eight bytes each, and only pointers are written before a launch. So one belongs to
    one thread.

    Parameters
    ----------
    call : Launch
        Checked, and run once: the thread has a context.
    device : int
    pairs : tuple
        The arrays that may not overlap, as ``signature.neighbours`` returns them.
    """

    def __init__(self, call: Launch, device: int, pairs: Any = ()) -> None:
        import cupy

        self.call = call  # keeps the module loaded
        self.device = device
        self.pairs = pairs
        arrays = [isinstance(value, (cupy.ndarray, np.uintp)) for value in call.values]
        count = self.arrays = sum(arrays)
        # Arrays come first in every signature, so one call writes all pointers.
        assert all(arrays[:count]), call.function
        cells = array("Q", bytes(8 * len(call.values)))
        for place, value in enumerate(call.values[count:], count):
            # Little-endian, as every machine with CUDA: the value's bytes come first.
            cells[place] = int.from_bytes(value.tobytes(), "little")
        start = cells.buffer_info()[0]
        addresses = array("Q", range(start, start + 8 * len(cells), 8))
        self._write = functools.partial(struct.Struct(f"{count}Q").pack_into, cells, 0)
        self._stream = cupy.cuda.get_current_stream
        sizes = *(*call.grid, 1, 1)[:3], *(*call.block, 1, 1)[:3]
        self._start = functools.partial(
            cupy.cuda.driver.launchKernel, call.function.kernel.ptr, *sizes, call.shared
        )
        self._addresses = addresses.buffer_info()[0]
        self._memory = cells, addresses

    def run(self, pointers: Sequence[int]) -> None:
        """Launch it on the current stream with these pointers, 0 for None."""
        self._write(*pointers)
        self._start(self._stream(self.device).ptr, self._addresses, 0)

    def run_on(self, stream: int, pointers: Sequence[int]) -> None:
        """Launch it on the stream with this address."""
        self._write(*pointers)
        self._start(stream, self._addresses, 0)


def submit(call: Callable[[], Any]) -> None:
    """Run a checked launch, or put it on the tape while one is being recorded."""
    calls = THREAD.calls
    if calls is None:
        call()
    else:
        calls.append(call)


def recording() -> bool:
    """Whether launches of this thread are being recorded."""
    return THREAD.calls is not None


@contextlib.contextmanager
def recorded() -> Iterator[list[Callable[[], Any]]]:
    """Collect the launches made inside instead of running them.

    They hold their arrays, and are valid as long as those are what is meant:
    checks are made once, when recording, and not again when replaying. Their kernels are
    compiled side by side from now on; :func:`load` waits for them.
    """
    calls: list[Callable[[], Any]] = []
    THREAD.calls = calls
    try:
        yield calls
    finally:
        THREAD.calls = None


def load(calls: Iterable[Callable[[], Any]]) -> None:
    """Wait for the kernels of recorded launches, and load them."""
    for call in calls:
        if isinstance(call, Launch):
            call.load()
