"""Softmax over the last dimension. Kernels: cuda_src/softmax_rows.cu."""

from __future__ import annotations

import functools
import math
from typing import Any

from .core.device import current_device, has_clusters
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_WARPS = 4  # rows of a block where a row has a warp
_BLOCKS = 8  # of a cluster
_HELD = 16  # HELD in softmax_rows.cu: channels of a thread
_WIDE = 8192  # channels from which on a row has a cluster
_SOFTMAX = "x: ELEM[*N,C], out: ELEM[*N,C]~, N, C, x_stride, out_stride"
# By whether the blocks of a cluster share a row.
SOFTMAX = {
    False: Kernel("softmax_rows.cu", "softmax", _SOFTMAX),
    True: Kernel("softmax_rows.cu", "softmax_c8", _SOFTMAX),
}


@functools.lru_cache(4096)
def _blocks(
    device: int, shape: tuple[int, ...], itemsize: int
) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
    """Whether clusters share a row, grid and block; they follow from the row alone."""
    channels = shape[-1] if shape else 0  # which launch() refuses
    rows = math.prod(shape[:-1]) if channels else 0
    # The row may begin between two pieces, and a piece more hold its end.
    if channels + 16 // itemsize <= _HELD * 32:
        return False, (-(-rows // _WARPS),), (32, _WARPS)
    clustered = channels >= _WIDE and has_clusters()
    blocks, most = (_BLOCKS, 512) if clustered else (1, 1024)
    share = -(-channels // blocks) + 16 // itemsize
    threads = min(most, -(-share // (32 * _HELD)) * 32)
    return clustered, (rows * blocks,), (threads,)


def _cost(x: Array, out: Array | None) -> Cost:
    """Maximum, difference, exponential, sum and product: 5 per value."""
    return Cost(moved(x) + written(out, x.size, x.dtype), 5 * x.size)


@op(reference="reference.softmax", cost=_cost, only_launches=True)
def softmax(x: Array, *, out: Array | None = None) -> Array:
    """``exp(x - max) / sum(exp(x - max))`` over the last dimension.

    Parameters
    ----------
    x : array [..., C]
        On the GPU it may be a view whose rows lie one stride apart.
    out : array [..., C], optional
        Of x's dtype; may be x.

    Returns
    -------
    array [..., C]
        Of x's dtype; computed in float32. A row of -inf alone gives NaN.

    Raises
    ------
    InputError
        On the GPU, for a dtype, layout, alignment or device that the kernel does not take, and
        for an ``out`` that overlaps x.

    Notes
    -----
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018. On the GPU the last
    bits of a row depend on its address where rows are no multiples of 16 bytes.
    """
    if out is None:
        out = device_empty(x.shape, x.dtype)
    clustered, grid, block = _blocks(current_device(), x.shape, x.itemsize)
    launch(SOFTMAX[clustered], grid, block, (x, out), elem=x.dtype)
    return out
