"""Where the residual stream begins, and last rows of prompts. Kernels: cuda_src/embedding.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...errors import InputError
from ...quantize import QuantizedMatrix
from .. import quantized
from ..core.launch import Kernel, device_empty, launch
from ..core.registry import Cost, moved, op, written

Array = Any

EMBEDDING = Kernel(
    "embedding.cu",
    "embedding",
    "ids: int32[N], positions: int32[N], wte: ELEM[Vp,C], wpe: ELEM[P,C], out: float32[N,C], "
    "Vp, P, C",
)
LAST_ROWS = Kernel(
    "embedding.cu",
    "last_rows",
    "x: float32[N,C], attended: ELEM[N,C], starts: int32[S], y: float32[R,C], out: ELEM[R,C], C",
    overlaps=True,
)
_LOOKUP = "[*N], table: ELEM[V,C], out: ELEM[*N,C]!, V, C, out_stride"
# By the bytes of an id.
LOOKUP = {
    4: Kernel("lookup.cu", "lookup", "ids: int32" + _LOOKUP),
    8: Kernel("lookup.cu", "lookup_i64", "ids: int64" + _LOOKUP),
}


def _cost(ids: Array, positions: Array, wte: Array, wpe: Array, out: Array | None) -> Cost:
    """A row of each table per token, and one written of the residual stream's dtype."""
    size = len(ids) * wte.shape[1]
    rows = size * (wte.dtype.itemsize + wpe.dtype.itemsize)
    return Cost(moved(ids, positions) + rows + written(out, size, np.float32), size)


@op(reference="reference.embedding", cost=_cost)
def embedding(
    ids: Array, positions: Array, wte: Array, wpe: Array, *, out: Array | None = None
) -> Array:
    """``wte[ids] + wpe[positions]``: the start of the residual stream.

    Parameters
    ----------
    ids, positions : array of int32 [N]
        On the GPU a value outside its table gives a row of zeros.
    wte : array or QuantizedMatrix [Vp, C]
    wpe : array [P, C]
    out : array of float32 [N, C], optional

    Returns
    -------
    array of float32 [N, C]
        float64 where the tables are.
    """
    if isinstance(wte, QuantizedMatrix):
        return quantized.embedding(ids, positions, wte, wpe, out=out)
    if out is None:
        out = device_empty((len(ids), wte.shape[1]), np.float32)
    threads = _threads(wte.shape[1])
    launch(EMBEDDING, (len(ids),), (threads,), (ids, positions, wte, wpe, out), elem=wte.dtype)
    return out


def _check_lookup(ids: Array, table: Array, *, out: Array | None = None) -> None:
    if ids.dtype not in (np.int32, np.int64) or table.ndim != 2:
        raise InputError(
            f"ids are {ids.dtype.name}, and the table is of shape {list(table.shape)}",
            where="lookup",
            remedy="Give ids as int32 or int64, and a table of shape [V, C].",
        )


def _lookup_cost(ids: Array, table: Array, out: Array | None) -> Cost:
    size = ids.size * table.shape[1]
    return Cost(moved(ids) + size * table.itemsize + written(out, size, table.dtype), 0)


@op(reference="reference.lookup", cost=_lookup_cost, check=_check_lookup)
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
        If ``ids`` are no integers or the table is no matrix; on the GPU also for a dtype, layout,
        alignment or device that the kernel does not take, and for an ``out`` that overlaps.
    """
    channels = table.shape[1]
    if out is None:
        out = device_empty((*ids.shape, channels), table.dtype)
    grid = (ids.size if channels else 0,)
    launch(LOOKUP[ids.itemsize], grid, (_threads(channels),), (ids, table, out), elem=table.dtype)
    return out


def _check(x: Array, attended: Array, starts: Array, *, out: tuple[Array, Array]) -> None:
    if len(starts) != len(out[0]) + 1:
        raise InputError(
            f"{len(starts)} starts do not fit {len(out[0])} rows",
            where="last_rows",
            remedy="Give one start more than rows.",
        )


@op(reference="reference.last_rows", check=_check)
def last_rows(x: Array, attended: Array, starts: Array, *, out: tuple[Array, Array]) -> None:
    """Copy the row of each packed sequence's last token.

    Parameters
    ----------
    x : array of float32 [N, C]
    attended : array [N, C]
    starts : array of int32 [R + 1]
        Sequence r owns the rows from ``starts[r]`` to ``starts[r + 1] - 1``; one without rows
        gets a row of another.
    out : pair of arrays [R, C]
        Of x and of attended.

    Raises
    ------
    InputError
        If there are not as many sequences as rows of ``out``.
    """
    arrays = (x, attended, starts, *out)
    launch(LAST_ROWS, (len(out[0]),), (_threads(x.shape[1]),), arrays, elem=attended.dtype)


def _threads(channels: int) -> int:
    return min(256, -(-channels // 32) * 32)
