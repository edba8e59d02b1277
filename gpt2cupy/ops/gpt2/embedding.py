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


def _cost(ids: Array, positions: Array, wte: Array, wpe: Array, out: Array | None) -> Cost:
    """A row of each table per token, and one written of the residual stream's dtype."""
    size = len(ids) * wte.shape[1]
    rows = size * (wte.dtype.itemsize + wpe.dtype.itemsize)
    return Cost(moved(ids, positions) + rows + written(out, size, np.float32), size)


@op(
    reference="reference.embedding",
    cost=_cost,
    takes="ids: int32|int64[N], positions: int32|int64[N], wte: real|quantized[Vp,C], "
    "wpe: real[P,C], out: float32|float64[N,C]!",
    of_models=True,
)
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


def _check(x: Array, attended: Array, starts: Array, *, out: tuple[Array, Array]) -> None:
    if len(starts) != len(out[0]) + 1:
        raise InputError(
            f"{len(starts)} starts do not fit {len(out[0])} rows",
            where="last_rows",
            remedy="Give one start more than rows.",
        )


@op(
    reference="reference.last_rows",
    takes="x: real[N,C], attended: real[N,C], starts: int32[S], out.0: @x[R,C]!, "
    "out.1: @attended[R,C]!",
    check=_check,
    of_models=True,
)
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
