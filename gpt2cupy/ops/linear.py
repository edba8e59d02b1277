"""Products with a weight matrix, and what is fused with them.

One row goes to norm_gemv.cu; 2 to 16 rows of fp16 and bf16 to skinny.cu, up to 64, and with some
weights up to 256, to linear_rows.cu, more to cuBLASLt; what those cannot take to linear.cu and
cuBLAS. The backend "invariant" takes linear_rows.cu or linear_fixed.cu for any number.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..quantize import QuantizedMatrix
from . import quantized
from .core import blas
from .core.launch import device_empty, launch
from .core.registry import Cost, moved, op, written
from .linear_kernels import (
    BIAS_ACT,
    GEMV_SCALAR,
    NORM_GEMV,
    THREADS,
    WARP,
    fused_block,
    launch_fused,
    launch_gemv_add,
    launch_invariant,
    launch_rows,
    launch_skinny,
    longest_norm,
    takes_linear_rows,
    takes_skinny,
)
from .norm import layer_norm

Array = Any

ACTIVATION_CODES = {None: 0, "gelu_tanh": 1, "gelu_erf": 2, "relu": 3, "silu": 4, "tanh": 5}
_SCALAR_OUTPUTS = 4  # of a block of gemv_scalar, a warp each


def _cost(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array | None
) -> Cost:
    """The product, 2 N M K; the epilogue is not counted, except for its bytes.

    A matrix in int8 is read as it is: a byte per weight, and the scales.
    """
    (n, k), m = x.shape, len(weight)
    size = written(out, n * m, (x if residual is None else residual).dtype)
    return Cost(moved(x, weight, bias, residual) + size, 2 * n * m * k)


def _norm_cost(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    weight: Array,
    bias: Array | None,
    out: Array | None,
) -> Cost:
    """The norm once and the product, with nothing written between them."""
    (m, k), n = weight.shape, len(x)
    read = moved(x, norm_weight, norm_bias, weight, bias)
    size = written(out, n * m, norm_weight.dtype)
    return Cost(read + size, 8 * x.size + 2 * n * m * k)


def _epilogue_cost(
    x: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> Cost:
    """An addition per bias and residual, and one operation per activated value."""
    parts = sum(each is not None for each in (bias, residual, activation))
    return Cost(moved(x, bias, residual) + written(out, x.size, x.dtype), parts * x.size)


@op(reference=None, cost=_cost)
def gemv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str = "ours",
) -> Array:
    """:func:`linear` for one row on the GPU, with the backend named.

    Parameters
    ----------
    x, weight, bias, activation, residual, out
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
    if (fused := fused_block(weight, backend)) is not None:
        launch_gemv_add(fused, weight, args, wide)
    else:
        grid = (-(-len(weight) // _SCALAR_OUTPUTS),)
        launch(GEMV_SCALAR[wide], grid, (_SCALAR_OUTPUTS * WARP,), args, elem=weight.dtype)
    return out


@op(reference="reference.norm_linear", cost=_norm_cost)
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
    scratch: Array | None = None,
) -> Array:
    """``linear(layer_norm(x), weight, bias)``; one kernel for one row on the GPU.

    More rows, K above 2048 and other backends than "ours" take a norm of its own.

    Parameters
    ----------
    x : array [N, K]
        The residual stream; float32 on the GPU.
    norm_weight, norm_bias : array [K]
    eps : float
    weight : array or QuantizedMatrix [M, K]
    bias : array [M], optional
        Of out's dtype.
    activation : {None, "gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    out : array [N, M], optional
        Of norm_weight's dtype, or float32.
    h : array [N, K], optional
        Where the normed rows go if they are written at all.
    backend : {"ours", "cublas", "invariant"}
        As in :func:`linear`.
    scratch : array [n], optional
        As in :func:`linear`.

    Returns
    -------
    array [N, M]
        Of norm_weight's dtype unless ``out`` says otherwise.

    Raises
    ------
    InputError
        On the GPU, for a wrong dtype, shape or layout.
    """
    if isinstance(weight, QuantizedMatrix):
        if quantized.takes_norm(x, weight, backend):
            if out is None:
                out = device_empty((1, len(weight)), norm_weight.dtype)
            norm = x, norm_weight, norm_bias, eps
            return quantized.norm_product(*norm, weight, bias, ACTIVATION_CODES[activation], out)
        h = layer_norm(x, norm_weight, norm_bias, eps, out=h)
        return linear(
            h, weight, bias, activation=activation, out=out, backend=backend, scratch=scratch
        )
    fused = fused_block(weight, backend) if len(x) == 1 else None
    if fused is None or weight.shape[1] > longest_norm():
        h = layer_norm(x, norm_weight, norm_bias, eps, out=h)
        return linear(h, weight, bias, activation=activation, out=out, backend=backend)
    if out is None:
        out = device_empty((len(x), len(weight)), weight.dtype)
    code = ACTIVATION_CODES[activation]
    wide = out.dtype == np.float32
    args = (x, norm_weight, norm_bias, weight, bias, out, eps, code)
    launch_fused(NORM_GEMV[wide], fused, weight, args)
    return out


@op(reference="reference.linear", cost=_cost)
def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str = "ours",
    scratch: Array | None = None,
) -> Array:
    """``activation(x @ weight.T + bias) + residual``.

    Parameters
    ----------
    x : array [N, K]
    weight : array or QuantizedMatrix [M, K]
        Rows, of x's dtype or in int8.
    bias : array [M], optional
        Of out's dtype.
    activation : {None, "gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    residual : array [N, M], optional
        Of out's dtype; may lie where ``out`` does, which is then updated in place.
    out : array [N, M], optional
        Of x's dtype, or float32.
    backend : {"ours", "cublas", "invariant"}
        Which kernels multiply few rows (on sm_90 up to 64, with some weights 256) on the GPU;
        more go to cuBLAS either way. With "invariant", here and on the CPU, any number of
        rows has one kernel and one order of sums: the bits of a row do not depend on the
        others.
    scratch : array [n], optional
        Of x's dtype: where a matrix in int8 is dequantised if it must be; without it, or
        where it is too small, memory is allocated.

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
    if isinstance(weight, QuantizedMatrix):
        if quantized.takes(x, weight, backend):
            if out is None:
                out = _output(x, weight, residual)
            code = ACTIVATION_CODES[activation]
            return quantized.product(x, weight, bias, code, residual, out, backend)
        weight = quantized.dequantize(weight, x.dtype, scratch=scratch)
    if out is None:
        out = _output(x, weight, residual)
    code = ACTIVATION_CODES[activation]
    if backend == "invariant":
        launch_invariant(x, weight, out, (x, weight, bias, residual, out, code))
        return out
    if len(x) == 1:
        epilogue: Any = {"activation": activation, "residual": residual}
        return gemv(x, weight, bias, out=out, backend=backend, **epilogue)
    if takes_skinny(len(x), weight, backend):
        args = (x, weight, bias, residual, out, code)
        launch_skinny(weight, args, out.dtype == np.float32)
        return out
    if takes_linear_rows(len(x), weight, backend):
        launch_rows(x, weight, out, (x, weight, bias, residual, out, code))
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


@op(reference="reference.bias_act", cost=_epilogue_cost)
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
    if out is None:
        out = device_empty(x.shape, x.dtype)
    blocks = min(-(-x.size // THREADS), 4096)
    args = (x, bias, residual, out, ACTIVATION_CODES[activation])
    launch(BIAS_ACT[x.dtype == np.float32], (blocks,), (THREADS,), args, elem=x.dtype)
    return out


def _alike(a: Array, b: Array) -> bool:
    return (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype)


def _output(x: Array, weight: Array, residual: Array | None) -> Array:
    dtype = x.dtype if residual is None else residual.dtype
    return device_empty((len(x), len(weight)), dtype)
