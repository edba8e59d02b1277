"""Gradients of layer norm and RMS norm. Kernels: cuda_src/norm_backward.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op

Array = Any

_TAKES = "dy: @x[*N,C], x: real[*N,C], weight: @x[C]?, eps: positive"
_THREADS = 512  # of a row at most
_WARP, _LANES = 32, 8  # LANES in norm_backward.cu
_GROUPS = 128  # of rows at most, whose sums are added last

ROWS = Kernel(
    "norm_backward.cu",
    "norm_backward_rows",
    "dy: ELEM[*N,C], x: ELEM[*N,C], weight: ELEM[C]?, dx: ELEM[*N,C]!, stats: float32[N,2]!, "
    "eps: float, centred: int, C, dy_stride, x_stride, dx_stride",
)
GROUPS = Kernel(
    "norm_backward.cu",
    "norm_backward_groups",
    "dy: ELEM[*N,C], x: ELEM[*N,C], stats: float32[N,2], partials: float32[G,2,C]!, "
    "N, C, G, dy_stride, x_stride",
)
TOTAL = Kernel(
    "norm_backward.cu",
    "norm_backward_total",
    "partials: float32[G,2,C], dweight: ELEM[C]!?, dbias: ELEM[C]!?, G, C",
)


def _cost(dy: Array, x: Array, weight: Array | None) -> Cost:
    """Inputs, dx, dweight, dbias; statistics (4), two sums (5), dx (5), dweight (2) per value."""
    return Cost(moved(dy, x, weight, x) + 2 * x.shape[-1] * x.itemsize, 16 * x.size)


def _rms_cost(dy: Array, x: Array, weight: Array | None) -> Cost:
    """Both inputs once, dx and dweight; statistics (2), a sum (3), dx (4), dweight (2)."""
    return Cost(moved(dy, x, weight, x) + x.shape[-1] * x.itemsize, 11 * x.size)


@op(reference="reference.layer_norm_backward", cost=_cost, takes=_TAKES)
def layer_norm_backward(
    dy: Array, x: Array, weight: Array | None, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`.layer_norm` by x, weight and bias, from that by its result.

    With ``n = (x - mean) / sigma`` and ``g = dy weight``::

        dx = (g - mean(g) - n mean(g n)) / sigma
        dweight = sum(dy n)        dbias = sum(dy)        over the rows

    Parameters
    ----------
    dy, x : array [..., C]
        Of one dtype.
    weight : array [C] or None
        Of that dtype.
    eps : float
        As it was in the forward pass.

    Returns
    -------
    dx : array [..., C]
    dweight, dbias : array [C]
        All of x's dtype; sums are kept in float32 and added in an order that never varies.

    Raises
    ------
    InputError
        As :func:`.layer_norm`.
    """
    return _backward(dy, x, weight, eps, True)


@op(reference="reference.rms_norm_backward", cost=_rms_cost, takes=_TAKES)
def rms_norm_backward(
    dy: Array, x: Array, weight: Array | None, eps: float = 1e-6
) -> tuple[Array, Array]:
    """Gradients of :func:`.rms_norm` by x and weight, from that by its result.

    With ``n = x / sigma``, ``sigma = sqrt(mean(x^2) + eps)`` and ``g = dy weight``::

        dx = (g - n mean(g n)) / sigma        dweight = sum(dy n)        over the rows

    Parameters
    ----------
    dy, x : array [..., C]
        Of one dtype.
    weight : array [C] or None
        Of that dtype.
    eps : float
        As it was in the forward pass.

    Returns
    -------
    dx : array [..., C]
    dweight : array [C]
        Both of x's dtype; sums are kept in float32 and added in an order that never varies.

    Raises
    ------
    InputError
        As :func:`.layer_norm`.
    """
    return _backward(dy, x, weight, eps, False)[:2]


def groups_of(rows: int) -> int:
    """Groups of rows whose sums are added last: at least 32 rows each."""
    return max(1, min(_GROUPS, -(-rows // 32)))


def _backward(
    dy: Array, x: Array, weight: Array | None, eps: float, centred: bool
) -> tuple[Array, Array, Array]:
    elem, channels = x.dtype, x.shape[-1] if x.ndim else 0
    rows = x.size // channels if channels else 0
    dx, dweight = device_empty(x.shape, elem), device_empty((channels,), elem)
    dbias = device_empty((channels,), elem)
    stats = device_empty((rows, 2), np.float32)
    partials = device_empty((groups_of(rows), 2, channels), np.float32)
    backward(dy, x, weight, dx, dweight, dbias if centred else None, stats, partials, eps)
    return dx, dweight, dbias


def backward(
    dy: Array,
    x: Array,
    weight: Array | None,
    dx: Array,
    dweight: Array,
    dbias: Array | None,
    stats: Array,
    partials: Array,
    eps: float,
) -> None:
    """The three launches, into arrays that are there; of layer norm if there is a ``dbias``."""
    elem, channels = x.dtype, x.shape[-1] if x.ndim else 0
    rows = len(stats)
    threads = min(_THREADS, max(_WARP, -(-channels // (4 * _WARP)) * _WARP))
    args = (dy, x, weight, dx, stats, eps, int(dbias is not None))
    launch(ROWS, (rows,), (threads,), args, elem=elem)
    groups = len(partials)
    grid = (-(-channels // _WARP), groups)
    launch(GROUPS, grid, (_WARP, _LANES), (dy, x, stats, partials), elem=elem)
    launch(TOTAL, (-(-channels // 256),), (256,), (partials, dweight, dbias), elem=elem)
