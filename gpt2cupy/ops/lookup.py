"""Rows of a table by their numbers. Kernels: cuda_src/lookup.cu."""

from __future__ import annotations

from typing import Any

from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_LOOKUP = "[*N], table: ELEM[V,C], out: ELEM[*N,C]!, V, C, out_stride"
# By the bytes of an id.
LOOKUP = {
    4: Kernel("lookup.cu", "lookup", "ids: int32" + _LOOKUP),
    8: Kernel("lookup.cu", "lookup_i64", "ids: int64" + _LOOKUP),
}


def _cost(ids: Array, table: Array, out: Array | None) -> Cost:
    size = ids.size * table.shape[1]
    return Cost(moved(ids) + size * table.itemsize + written(out, size, table.dtype), 0)


@op(
    reference="reference.lookup",
    cost=_cost,
    takes="ids: int32|int64[*N], table: real[V,C], out: @table[*N,C]!",
    only_launches=True,
)
def lookup(ids: Array, table: Array, *, out: Array | None = None) -> Array:
    """``table[ids]``: an embedding alone.

    Parameters
    ----------
    ids : array of int32 or int64 [...]
        One outside the table gives a row of zeros.
    table : array [V, C]
    out : array [..., C], optional
        Of the table's dtype.

    Returns
    -------
    array [..., C]
        Of the table's dtype.

    Raises
    ------
    InputError
        If ``ids`` are of another dtype or the table is no matrix, and for an ``out`` that does
        not fit or overlaps; on the GPU also for a layout, alignment or device that the kernel
        does not take.
    """
    channels = table.shape[1]
    if out is None:
        out = device_empty((*ids.shape, channels), table.dtype)
    grid = (ids.size if channels else 0,)
    launch(
        LOOKUP[ids.itemsize],
        grid,
        (min(256, max(1, -(-channels // 32)) * 32),),
        (ids, table, out),
        elem=table.dtype,
    )
    return out
