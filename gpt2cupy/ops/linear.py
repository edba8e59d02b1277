"""GEMV and GEMM with a weight matrix, and what is fused with them.

One row goes to norm_gemv.cu, or to skinny.cu in large models of fp16 and bf16; 2 to 16 rows of
those to skinny.cu, and of float32 to linear_fixed.cu; up to 64, and with some weights up to 256, to
linear_rows.cu, more to cuBLASLt; what those cannot take to linear.cu and cuBLAS. Unless a backend
is named, as the model does, many rows of float32 go to linear_split.cu, and few rows of large
weights to cuBLASLt. The backend "invariant" takes linear_rows.cu or linear_fixed.cu for any number.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import InputError
from ..quantize import QuantizedMatrix
from . import quantized
from .core import blas
from .core.launch import device_empty, launch
from .core.registry import Cost, moved, op, written
from .epilogue import ACTIVATION_CODES, bias_act
from .linear_kernels import (
    GEMV_SCALAR,
    WARP,
    fused_block,
    launch_fixed,
    launch_gemv_add,
    launch_invariant,
    launch_rows,
    launch_skinny,
    takes_fixed,
    takes_library,
    takes_linear_rows,
    takes_skinny,
)
from .linear_split import launch_split, takes_split

Array = Any

_SCALAR_OUTPUTS = 4  # of a block of gemv_scalar, a warp each


def _cost(
    x: Array, weight: Array, bias: Array | None, residual: Array | None, out: Array | None
) -> Cost:
    """The product, 2 N M K; the epilogue is not counted, except for its bytes.

    A matrix in int8 is read as it is: a byte per weight, and the scales.
    """
    m, k = weight.shape
    n = math.prod(x.shape[:-1])
    size = written(out, n * m, (x if residual is None else residual).dtype)
    return Cost(moved(x, weight, bias, residual) + size, 2 * n * m * k)


@op(
    reference=None,
    cost=_cost,
    takes="x: real[N,K], weight: @x[M,K], bias: real[M]?, "
    "activation: gelu_tanh|gelu_erf|relu|silu|tanh?, residual: real[N,M]?, "
    "out: real[N,M]!residual, backend: ours|cublas",
    of_models=True,
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
    if takes_skinny(1, weight, backend):
        launch_skinny(1, weight, args, wide)
    elif (fused := fused_block(weight, backend)) is not None:
        launch_gemv_add(fused, weight, args, wide)
    else:
        grid = (-(-len(weight) // _SCALAR_OUTPUTS),)
        launch(GEMV_SCALAR[wide], grid, (_SCALAR_OUTPUTS * WARP,), args, elem=weight.dtype)
    return out


@op(
    reference="reference.linear",
    cost=_cost,
    takes="x: real[*N,K], weight: @x|quantized[M,K], bias: @out,residual,x[M]?, "
    "activation: gelu_tanh|gelu_erf|relu|silu|tanh?, residual: @x|float32[*N,M]?, "
    "out: @residual;@x|float32[*N,M]!residual, backend: auto|ours|cublas|invariant, "
    "scratch: @x[n]?",
    only_launches=True,
)
def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str = "auto",
    scratch: Array | None = None,
) -> Array:
    """``activation(x @ weight.T + bias) + residual``.

    Parameters
    ----------
    x : array [..., K]
        Contiguous; leading dimensions are any, N rows in all.
    weight : array or QuantizedMatrix [M, K]
        Rows, of x's dtype or in int8: as ``torch.nn.Linear`` holds them.
    bias : array [M], optional
        Of out's dtype.
    activation : {None, "gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
        In fp16 and bf16 tanh is the hardware's approximation, as in :func:`gelu`.
    residual : array [..., M], optional
        Of out's dtype; may be ``out``, which is then updated in place.
    out : array [..., M], optional
        Of x's dtype, or float32; shares no memory with x, weight or bias.
    backend : {"auto", "ours", "cublas", "invariant"}
        On the GPU "auto" takes what was measured to be the fastest: our kernels for few rows
        (on sm_90 up to 64, with some weights 256), for float32 with many rows
        linear_split.cu on sm_80 and sm_90, else cuBLASLt, which also has 2 to 64 rows of weights
        of 32 MiB and more. "ours", which models take, leaves these two rules out; "cublas" is the
        library for any number of rows. With "invariant", here and on the CPU, any number of rows
        has one kernel and one order of sums: the bits of a row do not depend on the others.
    scratch : array [n], optional
        Of x's dtype: where a matrix in int8 is dequantised if it must be; without it, or
        where it is too small, memory is allocated.

    Returns
    -------
    array [..., M]
        Of residual's dtype, else of x's, unless ``out`` says otherwise; sums are
        kept in float32.

    Raises
    ------
    InputError
        For an unknown activation or backend, for shapes or dtypes that do not fit, and for an
        ``out`` that overlaps an input; on the GPU also for a layout, alignment or device that the
        kernel does not take. The message names the argument.

    Notes
    -----
    linear_split.cu computes float32 on tensor cores by three products of TF32 parts, with an
    error like that of a product in float32. There an infinity in x or weight gives NaN.
    """
    if x.ndim != 2:
        return _of_rows(x, weight, bias, activation, residual, out, backend, scratch)
    if isinstance(weight, QuantizedMatrix):
        if quantized.takes(x, weight, "ours" if backend == "auto" else backend):
            if out is None:
                out = _output(x, weight, residual)
            code = ACTIVATION_CODES[activation]
            return quantized.product(
                x, weight, bias, code, residual, out, "ours" if backend == "auto" else backend
            )
        weight = quantized.dequantize(weight, x.dtype, scratch=scratch)
    if out is None:
        out = _output(x, weight, residual)
    code = ACTIVATION_CODES[activation]
    args = (x, weight, bias, residual, out, code)
    if not x.size or not out.size:
        return _of_nothing(bias, activation, residual, out)
    if backend == "auto":
        if out.dtype == np.float32 and takes_split(len(x), weight):
            launch_split(weight, len(x), args)
            return out
        if takes_library(len(x), weight):
            return _by_library(x, weight, bias, activation, residual, out)
        backend = "ours"
    if backend == "invariant":
        launch_invariant(x, weight, out, args)
        return out
    if len(x) == 1:
        epilogue: Any = {"activation": activation, "residual": residual}
        return gemv(x, weight, bias, out=out, backend=backend, **epilogue)
    if takes_skinny(len(x), weight, backend):
        launch_skinny(len(x), weight, args, out.dtype == np.float32)
        return out
    if takes_linear_rows(len(x), weight, backend):
        launch_rows(x, weight, out, args)
        return out
    if takes_fixed(len(x), weight, backend):
        launch_fixed(x, weight, out, args)
        return out
    return _by_library(x, weight, bias, activation, residual, out)


def _by_library(
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    out: Array,
) -> Array:
    """Many rows: cuBLASLt, and what its epilogue has not in one more pass over the output."""
    if residual is not None and activation is None and _alike(residual, out):
        blas.matmul(x, weight, bias, out, residual=residual)
        return out
    # Its GELU is an approximation about as fine as fp16: four times float32's error.
    library = ("relu",) if x.dtype == np.float32 else ("relu", "gelu_tanh")
    if residual is None and (activation is None or activation in library):
        blas.matmul(x, weight, bias, out, activation=activation)
        return out
    in_place = residual is not None and residual.data.ptr == out.data.ptr
    product = device_empty(out.shape, out.dtype) if in_place else out
    blas.matmul(x, weight, None, product, apart=residual)
    return bias_act(product, bias, activation, residual=residual, out=out)


def _of_nothing(
    bias: Array | None, activation: str | None, residual: Array | None, out: Array
) -> Array:
    """No rows, no outputs, or no inputs: sums of nothing."""
    if not out.size:
        return out
    zeros = device_empty(out.shape, out.dtype)
    zeros.fill(0)
    return bias_act(zeros, bias, activation, residual=residual, out=out)


def _of_rows(
    x: Array,
    weight: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
    backend: str,
    scratch: Array | None,
) -> Array:
    """:func:`linear` of an x of any leading dimensions."""
    shape = (*x.shape[:-1], len(weight))
    if out is None:
        out = device_empty(shape, (x if residual is None else residual).dtype)
    linear(
        as_rows(x, "x", x.shape, "linear"),
        weight,
        bias,
        activation=activation,
        residual=None if residual is None else as_rows(residual, "residual", shape, "linear"),
        out=as_rows(out, "out", shape, "linear"),
        backend=backend,
        scratch=scratch,
    )
    return out


def as_rows(array: Array, name: str, shape: tuple[int, ...], where: str) -> Array:
    """A view of a contiguous array [..., C] as [N, C]; raises where that would be a copy."""
    if array.shape != shape or not array.flags.c_contiguous:
        contiguous = "" if array.flags.c_contiguous else ", not contiguous"
        raise InputError(
            f"{name} is {array.dtype.name}{list(array.shape)}{contiguous}; the kernel takes a "
            f"contiguous one of shape {list(shape)}",
            where=f"{where}: {name}",
            remedy="Nothing is copied or broadcast silently: convert or copy the array first.",
        )
    return array.reshape(math.prod(shape[:-1]), shape[-1])


def _alike(a: Array, b: Array) -> bool:
    return (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype)


def _output(x: Array, weight: Array, residual: Array | None) -> Array:
    dtype = x.dtype if residual is None else residual.dtype
    return device_empty((len(x), len(weight)), dtype)
