"""Tensor maps: what tells the copy engine of a chip where the tiles of an array lie (sm_90)."""

from __future__ import annotations

import ctypes
import functools
from typing import Any, NamedTuple

from ...errors import DeviceError

MAP_BYTES = 128
_ALIGNMENT = 64
_CHANNELS = 64  # of a tile: rows of 128 bytes, which wgmma reads


class Tiles(NamedTuple):
    """A parameter of a kernel: tiles of ``rows`` tokens of an array [B, T, H, C], by value.

    What the kernel gets holds the array's address, and so is made again for an array elsewhere.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # bytes
    rows: int

    def write(self, pointer: int, to: int) -> None:
        """Write the map of an array at ``pointer`` to an address of the host."""
        ctypes.memmove(to, _encoded(pointer, *self), MAP_BYTES)


def tiles_of(array: Any, rows: int) -> Tiles:
    """The tiles of an array of fp16 or bf16."""
    row = array.shape[-1] * array.itemsize
    # A stride that nothing is read with must still be one that the driver takes.
    strides = tuple(
        stride if count > 1 else row
        for count, stride in zip(array.shape, array.strides, strict=True)
    )
    return Tiles(array.dtype.name, array.shape, strides, rows)


def room() -> tuple[Any, int]:
    """Memory for a map, and the address in it where the map goes."""
    memory = (ctypes.c_uint8 * (MAP_BYTES + _ALIGNMENT))()
    return memory, -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT


@functools.lru_cache(4096)
def _encoded(
    pointer: int, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], rows: int
) -> bytes:
    from cuda.bindings import driver

    wide, narrow = driver.cuuint64_t, driver.cuuint32_t
    batch, tokens, heads, channels = shape
    error, found = driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{dtype.upper()}"),
        4,
        pointer,
        [wide(size) for size in (channels, tokens, heads, batch)],
        [wide(strides[dim]) for dim in (1, 2, 0)],
        [narrow(size) for size in (_CHANNELS, rows, 1, 1)],
        [narrow(1)] * 4,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceError(
            f"the driver makes no tensor map: {error!r}",
            where=f"an array {dtype}{list(shape)} with strides of {list(strides)} bytes",
            remedy="Report this with the message.",
        )
    return ctypes.string_at(found.getPtr(), MAP_BYTES)
