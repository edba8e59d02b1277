"""Products with a matrix in int8, and the embedding that reads one.

One row goes to gemv_int8.cu, up to 64 to skinny_int8.cu, and with the backend "invariant" any
number. Else the matrix is dequantised (quantize.cu) and multiplied as any other.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .. import quantize as host
from ..quantize import SCALE_DTYPE, QuantizedMatrix
from .core.cuda_source import constants
from .core.device import has_mma, sm_count
from .core.launch import Kernel, device_empty, is_device_array, launch
from .core.registry import op
from .linear_kernels import LONGEST, WARP, entries, longest_norm

Array = Any

_MOST_ROWS = 64  # reading the weights four times is less than dequantising them
# Of gemv_int8.cu by its CHUNKS: as many as have registers at once. Blocks then iterate.
_THREADS_PER_SM = {1: 640, 2: 512}
_SKINNY_BLOCKS_PER_SM = 4

_MATRIX = "values: int8[M,K], scales: bfloat16[G,M]"
_GEMV = f"x: ELEM[1,K], {_MATRIX}, bias: OUT[M]?, residual: OUT[1,M]?, out: OUT[1,M]~, "
GEMV_ADD = entries("gemv_int8.cu", "gemv_add_int8", _GEMV + "activation: int, M", overlaps=True)
NORM_GEMV = entries(
    "gemv_int8.cu",
    "norm_gemv_int8",
    f"x: float32[1,K], norm_weight: ELEM[K], norm_bias: ELEM[K], {_MATRIX}, bias: OUT[M]?, "
    "out: OUT[1,M]!, eps: float, activation: int, M",
    overlaps=True,
)
SKINNY = entries(
    "skinny_int8.cu",
    "skinny_int8",
    _GEMV.replace("[1,", "[N,") + "activation: int, N, M",
    overlaps=True,
)
QUANTIZE = Kernel(
    "quantize.cu",
    "quantize",
    "x: float32[N,K], values: int8[N,K], scales: bfloat16[G,M], first: int, N, M, K",
)
DEQUANTIZE = Kernel(
    "quantize.cu", "dequantize", f"{_MATRIX}, out: ELEM[M,K], M, K", writes_weights=True
)
EMBEDDING = Kernel(
    "quantize.cu",
    "embedding_int8",
    "ids: int32[N], positions: int32[N], values: int8[Vp,C], scales: bfloat16[G,Vp], "
    "wpe: ELEM[P,C], out: float32[N,C], Vp, P, C",
)


def reads_int8(rows: int, shape: tuple[int, ...], dtype: Any, backend: str) -> bool:
    """Whether kernels read an int8 matrix [M, K] itself for so many rows of ``dtype``.

    Not where float32 has more than one row, fp16 and bf16 more than 64 (but for "invariant"),
    rows of the matrix cannot be read 16 bytes at a time, or the chip lacks the tensor core
    instruction; and not for "cublas".
    """
    m, k = shape
    c = constants("gemv_int8.cu")
    if k % c["PIECE"] or k > LONGEST or m % c["ROWS"]:
        return False
    narrow = np.dtype(dtype) != np.float32 and has_mma()
    if backend == "invariant":
        return narrow
    return backend == "ours" and (rows == 1 or (rows <= _MOST_ROWS and narrow))


def takes(x: Array, weight: QuantizedMatrix, backend: str) -> bool:
    """Whether :func:`product` is there for these."""
    return is_device_array(x) and reads_int8(len(x), weight.shape, x.dtype, backend)


def takes_norm(x: Array, weight: QuantizedMatrix, backend: str) -> bool:
    """Whether :func:`norm_product` is there for these."""
    one = len(x) == 1 and backend == "ours"
    return one and weight.shape[1] <= longest_norm() and takes(x, weight, backend)


def scratch_size(rows: int, weights: Iterable[Any], dtype: Any, backend: str) -> int:
    """Elements of the largest of some matrices that has to be dequantised for so many rows."""
    on_device = [w for w in weights if isinstance(w, QuantizedMatrix) and is_device_array(w.values)]
    shapes = [w.shape for w in on_device if not reads_int8(rows, w.shape, dtype, backend)]
    return max((m * k for m, k in shapes), default=0)


def product(
    x: Array,
    weight: QuantizedMatrix,
    bias: Array | None,
    activation: int,
    residual: Array | None,
    out: Array,
    backend: str,
) -> Array:
    """``activation(x @ weight.T + bias) + residual`` where :func:`takes` says so.

    Parameters
    ----------
    x : array [N, K]
    weight : QuantizedMatrix [M, K]
    bias, residual, out : array
        As in :func:`linear`.
    activation : int
        Its code in epilogue.cuh.
    backend : {"ours", "invariant"}
        The latter has one kernel for any number of rows.
    """
    (m, k), wide = weight.shape, out.dtype == np.float32
    args = (x, weight.values, weight.scales, bias, residual, out, activation)
    if len(x) == 1 and backend == "ours":
        _launch_gemv(GEMV_ADD[wide], m, k, args, x.dtype)
        return out
    c = constants("skinny_int8.cu", K=k)
    parts = -(-len(x) // c["ROWS"])
    most = max(1, sm_count() * _SKINNY_BLOCKS_PER_SM // parts)
    grid = (min(-(-m // c["TILE"]), most), parts)
    launch(SKINNY[wide], grid, (c["WARPS"] * c["WARP"],), args, elem=x.dtype, inner=k)
    return out


def norm_product(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    eps: float,
    weight: QuantizedMatrix,
    bias: Array | None,
    activation: int,
    out: Array,
) -> Array:
    """:func:`product` of one row's layer norm; where :func:`takes_norm` says so."""
    m, k = weight.shape
    args = (x, norm_weight, norm_bias, weight.values, weight.scales, bias, out, eps, activation)
    _launch_gemv(NORM_GEMV[out.dtype == np.float32], m, k, args, norm_weight.dtype)
    return out


def _launch_gemv(kernel: Kernel, m: int, k: int, args: tuple[Any, ...], elem: np.dtype) -> None:
    c = constants("gemv_int8.cu", K=k)
    blocks = min(m // c["ROWS"], sm_count() * (_THREADS_PER_SM[c["CHUNKS"]] // c["THREADS"]))
    launch(kernel, (blocks,), (c["THREADS"],), args, elem=elem, inner=k)


@op(
    reference="reference.dequantize",
    takes="matrix: quantized[M,K], dtype: any, scratch: any",
    of_models=True,
)
def dequantize(matrix: QuantizedMatrix, dtype: Any, *, scratch: Array | None = None) -> Array:
    """``values * scales``: the matrix [M, K] in full, rounded to ``dtype``.

    Parameters
    ----------
    matrix : QuantizedMatrix [M, K]
    dtype : dtype
        Of the result.
    scratch : array of dtype [n], optional
        Where it goes, if it is large enough; else to memory of its own.
    """
    m, k = matrix.shape
    if scratch is not None and scratch.dtype == dtype and scratch.size >= m * k:
        out = scratch[: m * k].reshape(m, k)
    else:
        out = device_empty((m, k), dtype)
    blocks = min(-(-m * k // (constants("quantize.cu")["PIECE"] * 256)), 16 * sm_count())
    args = (matrix.values, matrix.scales, out)
    launch(DEQUANTIZE, (blocks,), (256,), args, elem=out.dtype)
    return out


@op(
    reference="reference.quantize",
    takes="x: real[N,K], out: quantized[M,K]?, first: int",
    of_models=True,
)
def quantize(x: Array, *, out: QuantizedMatrix | None = None, first: int = 0) -> QuantizedMatrix:
    """Round a matrix to int8, with a scale for every 64 weights of a row.

    Parameters
    ----------
    x : array of float32 [N, K]
    out : QuantizedMatrix [M, K], optional
        Where it goes: rows ``first`` to ``first + N - 1`` of a larger one.
    first : int

    Returns
    -------
    QuantizedMatrix
    """
    if out is None:
        scales = device_empty(host.scale_shape(x.shape), SCALE_DTYPE)
        out = QuantizedMatrix(device_empty(x.shape, np.int8), scales)
    blocks = min(-(-len(x) * len(out.scales) // 8), 64 * sm_count())
    args = (x, out.values[first : first + len(x)], out.scales, first)
    launch(QUANTIZE, (blocks,), (8 * WARP,), args, elem=x.dtype)
    return out


def embedding(
    ids: Array, positions: Array, wte: QuantizedMatrix, wpe: Array, *, out: Array | None = None
) -> Array:
    """``wte[ids] + wpe[positions]`` with the token embedding in int8."""
    if out is None:
        out = device_empty((len(ids), wpe.shape[1]), np.float32)
    threads = min(256, -(-wpe.shape[1] // 32) * 32)
    args = (ids, positions, wte.values, wte.scales, wpe, out)
    launch(EMBEDDING, (len(ids),), (threads,), args, elem=wpe.dtype)
    return out
