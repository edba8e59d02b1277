"""Checkpoint tensors into resident GPU weights. Kernels: cuda_src/layout.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from .core.cuda_source import constants
from .core.launch import Kernel, device_empty, launch

_STORED = ("float32", "float16", "bfloat16")
TRANSPOSE = {
    name: Kernel("layout.cu", f"transpose_{name}", f"x: {name}[K,M], out: ELEM[M,K], K, M")
    for name in _STORED
}
CONVERT = {
    name: Kernel("layout.cu", f"convert_{name}", f"x: {name}[N], out: ELEM[N], n: int64")
    for name in _STORED
}
_PIECE = 8 << 20  # bytes of pinned memory of one of the two stages


class Uploader:
    """Copies host arrays to the device through two pinned stages, converting on arrival."""

    def __init__(self) -> None:
        import cupy

        self.cupy = cupy
        self.stages = [cupy.cuda.alloc_pinned_memory(_PIECE) for _ in range(2)]
        self.free = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self.turn = 0

    def copy(self, source: np.ndarray, target: Any) -> None:
        """Copy a host array's bytes in their own order to a device array of the same size."""
        data = np.ascontiguousarray(source).reshape(-1).view(np.uint8)
        stream = self.cupy.cuda.get_current_stream()
        for start in range(0, data.size, _PIECE):
            part = data[start : start + _PIECE]
            stage, event = self.stages[self.turn], self.free[self.turn]
            event.synchronize()
            np.frombuffer(stage, np.uint8, part.size)[:] = part
            self.cupy.cuda.runtime.memcpyAsync(
                target.data.ptr + start, stage.ptr, part.size, 1, stream.ptr
            )
            event.record(stream)
            self.turn ^= 1

    def place(self, source: np.ndarray, target: Any) -> None:
        """Copy ``source`` into ``target``, of the same shape and maybe another dtype.

        A transposed view (Fortran order) is sent as it lies in the file and
        transposed on the device.
        """
        if source.dtype.name not in _STORED or source.shape != target.shape:
            raise InputError(
                f"cannot place {source.dtype.name}{list(source.shape)} into "
                f"{target.dtype.name}{list(target.shape)}",
                where="loading weights",
                remedy=f"Tensors are {', '.join(_STORED)} in the configuration's shapes.",
            )
        transposed = source.ndim == 2 and not source.flags.c_contiguous
        if source.dtype == target.dtype and not transposed:
            self.copy(source, target)
            return
        name, elem = source.dtype.name, target.dtype
        if transposed:
            raw = device_empty(source.shape[::-1], source.dtype)
            self.copy(source.T, raw)
            c = constants("layout.cu")
            grid = (-(-raw.shape[1] // c["TILE"]), -(-raw.shape[0] // c["TILE"]))
            launch(TRANSPOSE[name], grid, (c["TILE"], c["TILE_ROWS"]), (raw, target), elem=elem)
        else:
            raw = device_empty((source.size,), source.dtype)
            self.copy(source, raw)
            blocks = min(-(-source.size // 256), 65535)
            args = (raw, target.reshape(-1), source.size)
            launch(CONVERT[name], (blocks,), (256,), args, elem=elem)
