"""cuLaunchKernelEx: launches that may start while the kernel before them still runs.

CuPy has no launch attributes. Here the configuration lies in memory once, and only the stream is
written before a launch.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import sys
from collections.abc import Callable
from typing import Any

# CUlaunchConfig: grid, block, shared bytes, then stream, attributes and their number.
_CONFIG = struct.Struct("7I4xQQI4x")
_STREAM_AT = 32
# CUlaunchAttribute of 72 bytes: its id, 4 bytes between, and a value.
_ATTRIBUTE = struct.Struct("I4xI60x")
_PROGRAMMATIC_STREAM_SERIALIZATION = 6


@functools.cache
def _launch() -> Callable[..., int]:
    """The driver's function; it takes addresses, and lets other threads run."""
    name = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    function = ctypes.CDLL(name).cuLaunchKernelEx
    function.argtypes, function.restype = [ctypes.c_void_p] * 4, ctypes.c_int
    return function


def programmatic_start(
    kernel: int, grid: tuple[int, ...], block: tuple[int, ...], shared: int
) -> Callable[[int, int, int], None]:
    """A function that launches a kernel, which waits for its predecessor by itself.

    Parameters
    ----------
    kernel : int
        CUfunction.
    grid, block : tuple of int
    shared : int
        Bytes of dynamic shared memory of a block.

    Returns
    -------
    callable(stream, addresses, extra)
        As ``cupy.cuda.driver.launchKernel`` takes its last arguments. It belongs to one thread.
    """
    import cupy

    attribute = ctypes.create_string_buffer(_ATTRIBUTE.size)
    _ATTRIBUTE.pack_into(attribute, 0, _PROGRAMMATIC_STREAM_SERIALIZATION, 1)
    config = ctypes.create_string_buffer(_CONFIG.size)
    sizes = *(*grid, 1, 1)[:3], *(*block, 1, 1)[:3], shared
    _CONFIG.pack_into(config, 0, *sizes, 0, ctypes.addressof(attribute), 1)
    write_stream = functools.partial(struct.Struct("Q").pack_into, config, _STREAM_AT)
    launch, at, failure = _launch(), ctypes.addressof(config), cupy.cuda.driver
    memory: Any = attribute  # which the configuration points to

    def start(stream: int, addresses: int, extra: int, memory: Any = memory) -> None:
        write_stream(stream)
        if error := launch(at, kernel, addresses, None):
            raise failure.CUDADriverError(error)

    return start
