"""Layer norm and RMS norm, alone and with the residual addition before them.

Kernels: cuda_src/norm.cu, add_norm.cu and rms_norm.cu.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from .core.cuda_source import constants
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any
Pair = tuple[Array | None, Array | None]

_PAIR = "out.0: @weight,x[*N,C]~, out.1: @residual[*N,C]~"
_WARP, _ROWS = 32, 4  # threads of a warp; rows of a block where a row has a warp
_ROWS_OF_A_STEP = 64  # up to so many rows of float get more warps each


def _kernels(
    source: str, added_source: str, entry: str, bias: str
) -> tuple[dict[bool, Kernel], dict[bool, Kernel]]:
    """The kernels alone and with an addition, by whether x, or the residual, is ELEM."""
    after = f"weight: ELEM[C]?, {bias}out: ELEM[*N,C]~, eps: float, N, C, x_stride, "
    alone, added = {}, {}
    for elem, dtype, ending in ((True, "ELEM", ""), (False, "float32", "_f32")):
        alone[elem] = Kernel(
            source,
            entry + ending,
            f"x: {dtype}[*N,C], {after}out_stride",
            overlaps=True,
            waits_first=True,
        )
        added[elem] = Kernel(
            added_source,
            f"add_{entry}{ending}",
            f"x: ELEM[*N,C], residual: {dtype}[*N,C], total: {dtype}[*N,C]~, {after}"
            "residual_stride, total_stride, out_stride",
            overlaps=True,
            waits_first=True,
        )
    return alone, added


LAYER_NORM, ADD_LAYER_NORM = _kernels("norm.cu", "add_norm.cu", "layer_norm", "bias: ELEM[C]?, ")
RMS_NORM, ADD_RMS_NORM = _kernels("rms_norm.cu", "rms_norm.cu", "rms_norm", "")
LAYER_NORM_NAIVE = Kernel(
    "norm.cu",
    "layer_norm_naive",
    "x: float32[N,C], weight: ELEM[C], bias: ELEM[C], out: ELEM[N,C], eps: float, N, C",
)


@functools.lru_cache(4096)
def _blocks(
    shape: tuple[int, ...], itemsize: int, of_weight: int, centred: bool, in_pieces: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block: rows, and warps of a row, which its bits do not depend on.

    Bytes of an element are those of the widest input and of a weight. ``in_pieces`` says whether
    no stride keeps rows from being read in pieces of 16 bytes.
    """
    channels = shape[-1] if shape else 0  # which launch() refuses
    rows = math.prod(shape[:-1]) if channels else 0
    c = constants("norm.cu")
    elements = 16 // itemsize
    if in_pieces and not channels % elements:
        pieces, held = channels // elements, c["MOST_IN_PIECES"] // elements
    else:
        pieces, held = channels, c["MOST_SINGLE"]
    # Pieces of a lane: few rows leave the chip idle, and more warps make each short; of many, few
    # pieces a lane leave room for its weights. tools/sweep_rows.py measures it.
    if itemsize > of_weight and rows > _ROWS_OF_A_STEP:
        each = 8
    elif rows <= c["FEW_ROWS"] or (itemsize == 2 and not centred):
        each = 2
    else:
        each = 4
    each, most, warps = min(each, held), c["MOST_THREADS"] // _WARP, 1
    while warps < most and warps * _WARP * each < pieces:
        warps *= 2
    if most * _WARP * held < pieces:
        warps = most  # in passes: then bits depend on it
    if warps == 1:
        return (-(-rows // _ROWS),), (_WARP, _ROWS)
    return (rows,), (warps * _WARP, 1)


def _sizes(
    centred: bool, elem: Any, x: Array, *others: Array
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Grid and block for rows of these arrays."""
    arrays = x, *others
    itemsize = max(a.itemsize for a in arrays)
    piece = 16 // itemsize
    in_pieces = all(
        a._c_contiguous or not any(stride % (piece * a.itemsize) for stride in a.strides[:-1])
        for a in arrays
    )
    return _blocks(x.shape, itemsize, elem.itemsize, centred, in_pieces)


def _norm_cost(x: Array, weight: Array | None, bias: Array | None, out: Array | None) -> Cost:
    """Mean (1), variance (3), normalise (2), weight and bias (2): 8 per value."""
    kind = x.dtype if weight is None else weight.dtype
    return Cost(moved(x, weight, bias) + written(out, x.size, kind), 8 * x.size)


def _rms_cost(x: Array, weight: Array | None, out: Array | None) -> Cost:
    """Squares (2), normalise (1), weight (1): 4 per value."""
    kind = x.dtype if weight is None else weight.dtype
    return Cost(moved(x, weight) + written(out, x.size, kind), 4 * x.size)


def _add_norm_cost(
    x: Array, residual: Array, weight: Array | None, bias: Array | None, out: Pair | None
) -> Cost:
    """Layer norm of the sum, which is written too."""
    kind = x.dtype if weight is None else weight.dtype
    y, total = (None, None) if out is None else out
    sums = written(y, x.size, kind) + written(total, x.size, residual.dtype)
    return Cost(moved(x, residual, weight, bias) + sums, 9 * x.size)


def _add_rms_cost(x: Array, residual: Array, weight: Array | None, out: Pair | None) -> Cost:
    """RMS norm of the sum, which is written too."""
    return Cost(_add_norm_cost(x, residual, weight, None, out).bytes, 5 * x.size)


@op(
    reference="reference.layer_norm",
    cost=_norm_cost,
    takes="x: @weight|float32[*N,C], weight: real[C]?, bias: @weight,x[C]?, eps: positive, "
    "out: @weight,x[*N,C]~",
    only_launches=True,
)
def layer_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """Normalise each row: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Parameters
    ----------
    x : array [..., C]
        Of weight's dtype, or float32: the residual stream of a model. On the GPU it may be
        a view whose rows lie one stride apart.
    weight, bias : array [C] or None
        None stands for ones, and for zeros; without a weight the result is of x's dtype.
    eps : float
        Added to the variance, which divides by C.
    out : array [..., C], optional
        Of weight's dtype; may be x.

    Returns
    -------
    array [..., C]
        Of weight's dtype; sums are kept in float32.

    Raises
    ------
    InputError
        For a width or dtype that does not fit, and for an ``out`` that overlaps an input; on the
        GPU also for a layout, alignment or device that the kernel does not take.

    Notes
    -----
    Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    elem = x.dtype if weight is None else weight.dtype
    if out is None:
        out = device_empty(x.shape, elem)
    kernel = LAYER_NORM[x.dtype == elem]
    grid, block = _sizes(True, elem, x, out)
    launch(kernel, grid, block, (x, weight, bias, out, eps), elem=elem)
    return out


@op(
    reference="reference.rms_norm",
    cost=_rms_cost,
    takes="x: @weight|float32[*N,C], weight: real[C]?, eps: positive, out: @weight,x[*N,C]~",
    only_launches=True,
)
def rms_norm(
    x: Array, weight: Array | None, eps: float = 1e-6, *, out: Array | None = None
) -> Array:
    """Divide each row by its root mean square: ``x / sqrt(mean(x^2) + eps) * weight``.

    Parameters
    ----------
    x : array [..., C]
        Of weight's dtype, or float32. On the GPU it may be a view whose rows lie one stride
        apart.
    weight : array [C] or None
        None stands for ones; the result is then of x's dtype.
    eps : float
        Added to the mean of the squares.
    out : array [..., C], optional
        Of weight's dtype; may be x.

    Returns
    -------
    array [..., C]
        Of weight's dtype; sums are kept in float32.

    Raises
    ------
    InputError
        As :func:`layer_norm`.

    Notes
    -----
    Zhang, Sennrich, "Root Mean Square Layer Normalization", 2019.
    """
    elem = x.dtype if weight is None else weight.dtype
    if out is None:
        out = device_empty(x.shape, elem)
    grid, block = _sizes(False, elem, x, out)
    launch(RMS_NORM[x.dtype == elem], grid, block, (x, weight, out, eps), elem=elem)
    return out


@op(
    reference="reference.add_layer_norm",
    cost=_add_norm_cost,
    takes="x: @weight[*N,C], residual: @weight,x|float32[*N,C], weight: real[C]?, "
    f"bias: @weight,x[C]?, eps: positive, {_PAIR}",
    only_launches=True,
)
def add_layer_norm(
    x: Array,
    residual: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float = 1e-5,
    *,
    out: Pair | None = None,
) -> tuple[Array, Array]:
    """``total = x + residual``, and the layer norm of ``total``.

    Parameters
    ----------
    x : array [..., C]
        Of weight's dtype.
    residual : array [..., C]
        Of weight's dtype, or float32.
    weight, bias : array [C] or None
    eps : float
    out : pair of arrays [..., C], optional
        For the result, of weight's dtype, and for the sum, of the residual's: the residual
        itself to add in place. Either may be None.

    Returns
    -------
    y : array [..., C]
        The layer norm of the sum as it is stored, of weight's dtype.
    total : array [..., C]
        The sum, of the residual's dtype.

    Raises
    ------
    InputError
        As :func:`layer_norm`.
    """
    elem = x.dtype if weight is None else weight.dtype
    y, total = _pair(x, residual, elem, out)
    kernel = ADD_LAYER_NORM[residual.dtype == elem]
    args = (x, residual, total, weight, bias, y, eps)
    grid, block = _sizes(True, elem, x, residual, total, y)
    launch(kernel, grid, block, args, elem=elem)
    return y, total


@op(
    reference="reference.add_rms_norm",
    cost=_add_rms_cost,
    takes="x: @weight[*N,C], residual: @weight,x|float32[*N,C], weight: real[C]?, "
    f"eps: positive, {_PAIR}",
    only_launches=True,
)
def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array | None,
    eps: float = 1e-6,
    *,
    out: Pair | None = None,
) -> tuple[Array, Array]:
    """``total = x + residual``, and the RMS norm of ``total``.

    Parameters
    ----------
    x : array [..., C]
        Of weight's dtype.
    residual : array [..., C]
        Of weight's dtype, or float32.
    weight : array [C] or None
    eps : float
    out : pair of arrays [..., C], optional
        For the result, of weight's dtype, and for the sum, of the residual's: the residual
        itself to add in place. Either may be None.

    Returns
    -------
    y : array [..., C]
        The RMS norm of the sum as it is stored, of weight's dtype.
    total : array [..., C]
        The sum, of the residual's dtype.

    Raises
    ------
    InputError
        As :func:`layer_norm`.
    """
    elem = x.dtype if weight is None else weight.dtype
    y, total = _pair(x, residual, elem, out)
    kernel = ADD_RMS_NORM[residual.dtype == elem]
    args = (x, residual, total, weight, y, eps)
    grid, block = _sizes(False, elem, x, residual, total, y)
    launch(kernel, grid, block, args, elem=elem)
    return y, total


def _pair(x: Array, residual: Array, elem: Any, out: Pair | None) -> tuple[Array, Array]:
    y, total = (None, None) if out is None else out
    if y is None:
        y = device_empty(x.shape, elem)
    if total is None:
        total = device_empty(x.shape, residual.dtype)
    return y, total
