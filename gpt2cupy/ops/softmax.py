"""Softmax over the last dimension. Kernels: cuda_src/softmax_rows.cu."""

from __future__ import annotations

import functools
import math
from typing import Any

from .core.device import current_device, has_clusters, sm_count
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_WARPS = 4  # rows of a block where a row has a warp
_HELD = {1: 16, 2: 64, 4: 32, 8: 16}  # HELD in softmax_rows.cu: channels of a thread
_MOST = {1: 1024, 2: 512, 4: 512, 8: 512}  # threads of a block
_WIDE = 8192  # channels from which on the blocks of a cluster share a row
# By the blocks that share a row.
SOFTMAX = {
    parts: Kernel(
        "softmax_rows.cu",
        "softmax" + ending,
        "x: ELEM[*N,C], out: ELEM[*N,C]~, N, C, x_stride, out_stride",
    )
    for parts, ending in ((1, ""), (2, "_c2"), (4, "_c4"), (8, "_c8"))
}


@functools.lru_cache(4096)
def _blocks(
    device: int, shape: tuple[int, ...], itemsize: int
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Blocks that share a row, grid and block."""
    channels = shape[-1] if shape else 0  # which launch() refuses
    rows = math.prod(shape[:-1]) if channels else 0
    # The row may begin between two pieces, and a piece more hold its end.
    if channels + 16 // itemsize <= _HELD[1] * 32:
        return 1, (-(-rows // _WARPS),), (32, _WARPS)
    parts = 1
    if channels >= _WIDE and has_clusters():
        # As many as have a multiprocessor each.
        parts = max(n for n in SOFTMAX if n == 1 or rows * n <= sm_count())
    share = -(-channels // parts) + 16 // itemsize
    threads = min(_MOST[parts], -(-share // (32 * _HELD[parts])) * 32)
    return parts, (rows * parts,), (threads,)


def _cost(x: Array, out: Array | None) -> Cost:
    """Maximum, difference, exponential, sum and product: 5 per value."""
    return Cost(moved(x) + written(out, x.size, x.dtype), 5 * x.size)


@op(
    reference="reference.softmax",
    cost=_cost,
    takes="x: real[*N,C], out: @x[*N,C]~",
    only_launches=True,
)
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
        For another dtype, and for an ``out`` that does not fit or overlaps x; on the GPU also
        for a layout, alignment or device that the kernel does not take.

    Notes
    -----
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018. On the GPU the last
    bits of a row depend on its address where rows are no multiples of 16 bytes, and on the number
    of rows where they have 8192 channels or more.
    """
    if out is None:
        out = device_empty(x.shape, x.dtype)
    parts, grid, block = _blocks(current_device(), x.shape, x.itemsize)
    launch(SOFTMAX[parts], grid, block, (x, out), elem=x.dtype)
    return out
