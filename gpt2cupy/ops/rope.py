"""Rotary position embedding. Kernel: cuda_src/rope.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError, shown
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_THREADS = 256
ROPE = Kernel(
    "rope.cu",
    "rope",
    "x: ELEM[*N,H,D], cosines: float32[P,R], sines: float32[P,R], positions: int32[*N]?, "
    "out: ELEM[*N,H,D]~, interleaved: int, N, H, D, P, R, x_stride, out_stride",
)


def rope_tables(
    length: int, rotary_size: int, base: float = 10000.0, scale: Array | None = None
) -> tuple[Array, Array]:
    """The tables that :func:`rope` reads: cos and sin of ``position * base^(-2 i / R)``.

    Parameters
    ----------
    length : int
        Positions.
    rotary_size : int
        R: channels of a head that turn.
    base : float
    scale : array [R / 2], optional
        Factors of the frequencies, for contexts longer than those a model was trained on.

    Returns
    -------
    cosines, sines : NumPy array of float32 [length, R / 2]
        Computed in float64: in float32 an angle of 30,000 has an error of a thousandth.
    """
    real, whole = (int, float, np.integer, np.floating), (int, np.integer)
    for name, value, fine, remedy in (
        ("length", length, isinstance(length, whole) and 0 <= length < 1 << 31,
         "Give the number of positions."),
        ("rotary_size", rotary_size,
         isinstance(rotary_size, whole) and 2 <= rotary_size < 1 << 20 and not rotary_size % 2,
         "Give the even number of channels of a head that turn."),
        ("base", base, isinstance(base, real) and 0 < base < float("inf"),
         "Give a positive number."),
        ("scale", scale, scale is None or (isinstance(scale, np.ndarray) and scale.dtype.kind == "f"
                                           and scale.shape == (rotary_size // 2,)),
         "Give an array of floats, a factor for each pair."),
    ):  # fmt: skip
        if not fine:
            raise InputError(
                f"{name}={shown(value)} is impossible",
                where=f"rope_tables: {name}",
                remedy=remedy,
            )
    frequencies = float(base) ** (-np.arange(0, rotary_size, 2, dtype=np.float64) / rotary_size)
    if scale is not None:
        frequencies = frequencies * scale
    angles = np.arange(length, dtype=np.float64)[:, None] * frequencies
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def _check(
    x: Array,
    cosines: Array,
    sines: Array,
    positions: Array | None = None,
    *,
    interleaved: bool = False,
    out: Array | None = None,
) -> None:
    if 2 * cosines.shape[1] > x.shape[-1]:
        raise InputError(
            f"x of shape {list(x.shape)} does not fit tables of shape {list(cosines.shape)}",
            where="rope: cosines",
            remedy="Give x as [..., heads, channels] and tables as [positions, pairs], with at "
            "most as many pairs as a head has.",
        )


def _cost(x: Array, cosines: Array, positions: Array | None, out: Array | None) -> Cost:
    """A row of both tables per token; a multiplication and an addition, twice, per value."""
    tokens = x.size // max(x.shape[-1] * x.shape[-2], 1)
    tables = 2 * tokens * cosines.shape[1] * cosines.itemsize
    return Cost(moved(x, positions) + tables + written(out, x.size, x.dtype), 3 * x.size)


@op(
    reference="reference.rope",
    cost=_cost,
    takes="x: real[*N,H,D], cosines: float32[P,R], sines: float32[P,R], positions: int32[*N]?, "
    "interleaved: bool, out: @x[*N,H,D]~",
    check=_check,
    only_launches=True,
)
def rope(
    x: Array,
    cosines: Array,
    sines: Array,
    positions: Array | None = None,
    *,
    interleaved: bool = False,
    out: Array | None = None,
) -> Array:
    """Turn each pair (a, b) of a head's channels: ``(a cos - b sin, b cos + a sin)``.

    Parameters
    ----------
    x : array [..., H, D]
        H heads of D channels for each token; on the GPU it may be a view in which tokens lie
        one stride apart, as queries and keys in one array do.
    cosines, sines : array of float32 [P, R / 2]
        As :func:`rope_tables` makes them. R is at most D; channels from R on stay as they are.
    positions : array of int32 [...], optional
        The tables' row for each token, by default its number. One outside the tables gives zeros.
    interleaved : bool
        Whether channels 2 i and 2 i + 1 are a pair; else i and R / 2 + i are.
    out : array [..., H, D], optional
        Of x's dtype; may be x.

    Returns
    -------
    array [..., H, D]
        Of x's dtype; computed in float32.

    Raises
    ------
    InputError
        For tables that do not fit x or each other, for another dtype, and for an ``out`` that
        does not fit or overlaps; on the GPU also for a layout, alignment or device that the
        kernel does not take.

    Notes
    -----
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    if out is None:
        out = device_empty(x.shape, x.dtype)
    pairs = cosines.shape[1]
    # Every pair and every channel that stays may have a thread of its own.
    work = x.size // x.shape[-1] * (x.shape[-1] - pairs) if x.size else 0
    elements = 16 // x.itemsize
    if x._c_contiguous and out._c_contiguous and not (pairs % elements or x.shape[-1] % elements):
        work //= elements
    grid = (-(-work // _THREADS),)
    args = (x, cosines, sines, positions, out, int(interleaved))
    launch(ROPE, grid, (_THREADS,), args, elem=x.dtype)
    return out
