"""A layer norm and the product after it: one kernel for one row (norm_gemv.cu, skinny.cu)."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..quantize import QuantizedMatrix
from . import quantized
from .core.launch import device_empty
from .core.registry import Cost, moved, op, written
from .epilogue import ACTIVATION_CODES
from .linear import linear
from .linear_kernels import (
    NORM_GEMV,
    fused_block,
    launch_fused,
    launch_norm_once,
    launch_skinny_norm,
    longest_norm,
    takes_norm_once,
    takes_skinny_norm,
)
from .norm import layer_norm

Array = Any


def _norm_cost(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    weight: Array,
    bias: Array | None,
    out: Array | None,
    shift: Array | None,
) -> Cost:
    """The norm once and the product, with nothing written between them.

    A shift is read in place of both biases.
    """
    (m, k), n = weight.shape, len(x)
    biases = (norm_bias, bias) if shift is None else (shift,)
    read = moved(x, norm_weight, weight, *biases)
    size = written(out, n * m, norm_weight.dtype)
    return Cost(read + size, 8 * x.size + 2 * n * m * k)


@op(
    reference="reference.norm_linear",
    cost=_norm_cost,
    takes="x: real[N,K], norm_weight: real[K], norm_bias: real[K], eps: positive, "
    "weight: real|quantized[M,K], bias: real[M]?, "
    "activation: gelu_tanh|gelu_erf|relu|silu|tanh?, out: real[N,M]!, h: real[N,K]!, "
    "backend: ours|cublas|invariant, scratch: any, shift: float32[M]?",
    of_models=True,
)
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
    shift: Array | None = None,
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
    shift : array of float32 [M], optional
        ``shifted_bias(norm_bias, weight, bias)``, made before: with it one row has a kernel
        that does less, where :func:`gpt2cupy.ops.shift.takes_shift` says so. Elsewhere it
        changes nothing.

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
    if shift is not None and takes_norm_once(weight, backend):
        launch_norm_once(weight, (x, norm_weight, weight, shift, out, eps, code), wide)
        return out
    args = (x, norm_weight, norm_bias, weight, bias, out, eps, code)
    if takes_skinny_norm(weight, backend):
        launch_skinny_norm(weight, args, wide)
    else:
        launch_fused(NORM_GEMV[wide], fused, weight, args)
    return out
