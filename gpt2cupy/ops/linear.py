"""Products with a weight matrix, and what is fused with them.

One row goes to norm_gemv.cu, 2 to 16 rows to skinny.cu, up to 64 to linear_rows.cu, more to
cuBLASLt; what those cannot take goes to the kernels of linear.cu and to cuBLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import blas, reference
from .device import has_clusters, has_mma, sm_count
from .launch import Kernel, device_empty, is_device_array, launch
from .norm import layer_norm

Array = Any

ACTIVATION_CODES = {None: 0, "gelu_tanh": 1, "gelu_erf": 2, "relu": 3, "silu": 4, "tanh": 5}
BACKENDS = ("ours", "cublas")

_WARP = 32
_THREADS = 256
_BLOCKS_PER_SM = 4  # enough warps to keep the memory busy; blocks then take several turns
_SKINNY_ROWS = 16  # most rows of skinny.cu; ROWS there
_MOST_ROWS, _MOST_OUTPUTS = 64, 8192  # of linear_rows.cu; with more the library is faster
_TILE, _CHUNK, _STAGES = 64, 64, 4  # ROWS and OUTPUTS, CHUNK and STAGES there
_LONGEST_NORM = 2048  # longest row that the kernels normalise
_LONGEST = 8192  # longest row that fits their registers


def _entries(source: str, name: str, signature: str, **options: bool) -> dict[bool, Kernel]:
    """The entry whose output is ELEM, and the one whose output is float32."""
    return {
        False: Kernel(source, name, signature.replace("OUT", "ELEM"), **options),
        True: Kernel(source, f"{name}_f32", signature.replace("OUT", "float32"), **options),
    }


_GEMV = (
    "x: ELEM[1,K], weight: ELEM[M,K], bias: OUT[M]?, residual: OUT[1,M]?, out: OUT[1,M], "
    "activation: int, M"
)
_NORM_GEMV = (
    "x: float32[1,K], norm_weight: ELEM[K], norm_bias: ELEM[K], weight: ELEM[M,K], bias: OUT[M]?, "
    "out: OUT[1,M], eps: float, activation: int, M"
)
_AHEAD = ", ahead: ELEM[A,D]?, ahead_bytes: int64"
GEMV_ADD = _entries("norm_gemv.cu", "gemv_add", _GEMV + _AHEAD, overlaps=True)
NORM_GEMV = _entries("norm_gemv.cu", "norm_gemv", _NORM_GEMV + _AHEAD, overlaps=True)
_SKINNY = _GEMV.replace("[1,", "[N,").replace("int, M", "int, N, M")
SKINNY_ADD = _entries("skinny.cu", "skinny_add", _SKINNY, overlaps=True)
# By the number of blocks that share a tile, and whether the output is float32.
LINEAR_ROWS = {
    (blocks, wide): kernel
    for blocks in (1, 2, 4, 8)
    for wide, kernel in _entries(
        "linear_rows.cu", f"linear_rows_{blocks}", _SKINNY + ", K", overlaps=True
    ).items()
}
# The lower rungs of the ladder; gemv_scalar also takes the sizes that gemv_add cannot.
GEMV = _entries("linear.cu", "gemv", _GEMV + ", K")
GEMV_SCALAR = _entries("linear.cu", "gemv_scalar", _GEMV + ", K")
GEMV_NAIVE = _entries("linear.cu", "gemv_naive", _GEMV + ", K")
BIAS_ACT = _entries(
    "linear.cu",
    "bias_act",
    "x: OUT[N,M], bias: OUT[M]?, residual: OUT[N,M]?, out: OUT[N,M], activation: int, N, M",
)


def gemv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str = "ours",
    ahead: Array | None = None,
) -> Array:
    """:func:`linear` for one row on the GPU, with the backend named.

    Parameters
    ----------
    x, weight, bias, activation, residual, out, ahead
        As in :func:`linear`; x is [1, K].
    backend : {"ours", "cublas"}
        Our kernel with the epilogue inside, or cuBLAS and the epilogue as a
        second kernel.
    """
    if out is None:
        out = _output(x, weight, residual)
    code = ACTIVATION_CODES[activation]
    wide = out.dtype == np.float32
    if backend == "cublas":
        if residual is None:
            blas.gemv(x, weight, out)
            if bias is not None or code:
                bias_act(out, bias, activation, out=out)
        else:
            product = device_empty((1, len(weight)), out.dtype)
            blas.gemv(x, weight, product)
            bias_act(product, bias, activation, residual=residual, out=out)
        return out
    args = (x, weight, bias, residual, out, code)
    if (fused := _fused(1, weight, backend)) is not None:
        _launch(GEMV_ADD[wide], fused, weight, (*args, ahead, _whole_pieces(ahead)))
    else:
        grid = (-(-len(weight) // 4),)
        launch(GEMV_SCALAR[wide], grid, (4 * _WARP,), args, elem=weight.dtype)
    return out


def _whole_pieces(ahead: Array | None) -> int:
    """Bytes of what can be brought to L2, 16 at a time."""
    return 0 if ahead is None else ahead.nbytes // 16 * 16


def _fused(rows: int, weight: Array, backend: str) -> tuple[int, int] | None:
    """(outputs, warps) of a block of the kernel that fuses what is around a product of few rows.

    None where there is no such kernel: many rows, rows that cannot be read 16 bytes at a
    time, float32 in a batch, or a chip without the tensor core instruction.
    """
    k = weight.shape[1]
    if backend != "ours" or k * weight.dtype.itemsize % 16 or k > _LONGEST:
        return None
    if rows == 1:
        return (2 if k > _LONGEST_NORM else 8), 4  # GROUPS * ROWS and WARPS in norm_gemv.cu
    if rows <= _SKINNY_ROWS and weight.dtype != np.float32 and has_mma():
        return 8, 8  # TILE and WARPS in skinny.cu
    return None


def _launch(kernel: Kernel, fused: tuple[int, int], weight: Array, args: tuple[Any, ...]) -> None:
    outputs, warps = fused
    m, k = weight.shape
    blocks = min(-(-m // outputs), sm_count() * _BLOCKS_PER_SM)
    launch(kernel, (blocks,), (warps * _WARP,), args, elem=weight.dtype, inner=k)


def _takes_rows(rows: int, weight: Array, backend: str) -> bool:
    """Whether linear_rows.cu is there for a product of so many rows, and faster than cuBLASLt."""
    fits = weight.dtype != np.float32 and weight.shape[1] % 8 == 0
    few = rows <= _MOST_ROWS and len(weight) <= _MOST_OUTPUTS
    return backend == "ours" and few and fits and has_clusters()


def _rows_split(rows: int, outputs: int, chunks: int) -> int:
    """Blocks for each tile: the shortest way through K without more blocks than run at once."""
    tiles = -(-rows // _TILE) * -(-outputs // _TILE)
    usable = [s for s in (1, 2, 4, 8) if s == 1 or tiles * s <= 2 * sm_count()]
    return min(usable, key=lambda split: -(-chunks // split))


def _linear_rows(x: Array, weight: Array, out: Array, args: tuple[Any, ...]) -> None:
    rows, (m, k) = len(x), weight.shape
    chunks = -(-k // _CHUNK)
    split = _rows_split(rows, m, chunks)
    stages = min(_STAGES, -(-chunks // split))
    shared = stages * 2 * _TILE * _CHUNK * 2 + _TILE * (_TILE + 4) * 4
    grid = (-(-m // _TILE) * split, -(-rows // _TILE))
    kernel = LINEAR_ROWS[split, out.dtype == np.float32]
    launch(kernel, grid, (_THREADS,), args, elem=weight.dtype, shared=shared)


def norm_linear(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    eps: float,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    out: Array | None = None,
    h: Array | None = None,
    backend: str = "ours",
    ahead: Array | None = None,
) -> Array:
    """``linear(layer_norm(x), weight, bias)``; one kernel for 1 to 16 rows on the GPU.

    Float32 has that kernel for one row only; K above 2048 and chips older than sm_80
    (2 to 16 rows) take two.

    Parameters
    ----------
    x : array [N, K]
        The residual stream; float32 on the GPU.
    norm_weight, norm_bias : array [K]
    eps : float
    weight : array [M, K]
    bias : array [M], optional
        Of out's dtype.
    activation : {None, "gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    out : array [N, M], optional
        Of weight's dtype, or float32.
    h : array [N, K], optional
        Where the normed rows go if they are written at all.
    backend : {"ours", "cublas"}
        As in :func:`linear`; cuBLAS takes a norm of its own before it.

    ahead : array [A, D], optional
        As in :func:`linear`.

    Returns
    -------
    array [N, M]
        Of weight's dtype unless ``out`` says otherwise.

    Raises
    ------
    InputError
        On the GPU, for a wrong dtype, shape or layout.
    """
    if not is_device_array(x):
        return reference.norm_linear(
            x, norm_weight, norm_bias, eps, weight, bias, activation=activation, out=out, h=h
        )
    fused = _fused(1, weight, backend) if len(x) == 1 else None
    if fused is None or weight.shape[1] > _LONGEST_NORM:
        h = layer_norm(x, norm_weight, norm_bias, eps, out=h)
        return linear(h, weight, bias, activation=activation, out=out, backend=backend, ahead=ahead)
    if out is None:
        out = device_empty((len(x), len(weight)), weight.dtype)
    code = ACTIVATION_CODES[activation]
    args = (x, norm_weight, norm_bias, weight, bias, out, eps, code, ahead, _whole_pieces(ahead))
    _launch(NORM_GEMV[out.dtype == np.float32], fused, weight, args)
    return out


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str = "ours",
    ahead: Array | None = None,
) -> Array:
    """``activation(x @ weight.T + bias) + residual``.

    Parameters
    ----------
    x : array [N, K]
    weight : array [M, K]
        Rows, of x's dtype.
    bias : array [M], optional
        Of out's dtype.
    activation : {None, "gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    residual : array [N, M], optional
        Of out's dtype; may lie where ``out`` does, which is then updated in place.
    out : array [N, M], optional
        Of x's dtype, or float32.
    backend : {"ours", "cublas"}
        Who multiplies 1 to 16 rows on the GPU; more go to cuBLAS either way.
    ahead : array [A, D], optional
        Weights, of x's dtype, that the next product will read: our product of one row
        asks for them to be brought to the GPU's L2 cache meanwhile. It changes no result.

    Returns
    -------
    array [N, M]
        Of residual's dtype, else of x's, unless ``out`` says otherwise; sums are
        kept in float32.

    Raises
    ------
    InputError
        On the GPU, for a wrong dtype, shape or layout.
    """
    if not is_device_array(x):
        return reference.linear(x, weight, bias, activation=activation, residual=residual, out=out)
    if len(x) == 1:
        return gemv(
            x, weight, bias, activation=activation, residual=residual, out=out, backend=backend,
            ahead=ahead,
        )  # fmt: skip
    if out is None:
        out = _output(x, weight, residual)
    if (fused := _fused(len(x), weight, backend)) is not None:
        args = (x, weight, bias, residual, out, ACTIVATION_CODES[activation])
        _launch(SKINNY_ADD[out.dtype == np.float32], fused, weight, args)
        return out
    if _takes_rows(len(x), weight, backend):
        _linear_rows(x, weight, out, (x, weight, bias, residual, out, ACTIVATION_CODES[activation]))
        return out
    in_place = residual is not None and residual.data.ptr == out.data.ptr
    if in_place and activation is None and _alike(residual, out):
        blas.matmul(x, weight, bias, out, add=True)
        return out
    # What the library's epilogue has is fused; the rest is one more pass over the output. Its
    # GELU is an approximation about as fine as half precision: four times float32's error.
    library = ("relu",) if x.dtype == np.float32 else ("relu", "gelu_tanh")
    if residual is None and (activation is None or activation in library):
        blas.matmul(x, weight, bias, out, activation=activation)
        return out
    product = device_empty(out.shape, out.dtype) if in_place else out
    blas.matmul(x, weight, None, product)
    return bias_act(product, bias, activation, residual=residual, out=out)


def bias_act(
    x: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``activation(x + bias) + residual``, elementwise over [N, M].

    Parameters
    ----------
    x : array [N, M]
    bias : array [M], optional
    activation : {None, "gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    residual : array [N, M], optional
    out : array [N, M], optional
        May be x or residual. On the GPU all of them have one dtype.

    Returns
    -------
    array [N, M]
    """
    if not is_device_array(x):
        return reference.bias_act(x, bias, activation, residual=residual, out=out)
    if out is None:
        out = device_empty(x.shape, x.dtype)
    blocks = min(-(-x.size // _THREADS), 4096)
    args = (x, bias, residual, out, ACTIVATION_CODES[activation])
    launch(BIAS_ACT[x.dtype == np.float32], (blocks,), (_THREADS,), args, elem=x.dtype)
    return out


def _alike(a: Array, b: Array) -> bool:
    return (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype)


def _output(x: Array, weight: Array, residual: Array | None) -> Array:
    dtype = x.dtype if residual is None else residual.dtype
    return device_empty((len(x), len(weight)), dtype)
