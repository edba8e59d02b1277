"""Every op in plain NumPy: the oracle (float64 in, float64 through) and the CPU engine (float32).

Letters: N rows (packed tokens), B batch, T tokens, C channels, NH heads, HS head
size, K and M the inner and outer size of a GEMM, S cache slots. Inputs
narrower than float32 are computed in float32, as the kernels do.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import quantize as host
from ..quantize import QuantizedMatrix
from .reference_cached_attention import (
    attention_decode,
    attention_prefill,
    copy_slots,
    store_kv,
)
from .reference_product import product
from .reference_rows import (
    activate,
    add_layer_norm,
    add_rms_norm,
    bias_gelu,
    gelu,
    layer_norm,
    layer_norm_backward,
    lookup,
    rms_norm,
    rms_norm_backward,
    rope,
    silu_mul,
    softmax,
)
from .reference_rows import store as _store
from .reference_rows import wide as _wide
from .reference_sampling import (
    accept_drafts,
    propose_drafts,
    sample,
    sample_logits,
    target_logprobs,
    top_logprobs,
)

Array = Any

__all__ = [
    "accept_drafts",
    "add_layer_norm",
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "bias_act",
    "bias_gelu",
    "copy_slots",
    "dequantize",
    "embedding",
    "ffn",
    "gelu",
    "last_rows",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "lookup",
    "norm_linear",
    "propose_drafts",
    "quantize",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "sample",
    "sample_logits",
    "shifted_bias",
    "silu_mul",
    "softmax",
    "store_kv",
    "target_logprobs",
    "top_logprobs",
]


def _dense(matrix: Array | QuantizedMatrix, dtype: Any = np.float32) -> Array:
    """A matrix that may be in int8 as an array."""
    return host.dequantize(matrix, dtype) if isinstance(matrix, QuantizedMatrix) else matrix


def embedding(
    ids: Array,
    positions: Array,
    wte: Array | QuantizedMatrix,
    wpe: Array,
    *,
    out: Array | None = None,
) -> Array:
    tokens = _dense(wte)
    inside = (ids >= 0) & (ids < len(tokens)) & (positions >= 0) & (positions < len(wpe))
    if inside.all():
        x = _wide(tokens[ids]) + _wide(wpe[positions])
    else:  # idle rows run on past the context, and a draft may be none
        x = _wide(tokens[np.where(inside, ids, 0)]) + _wide(wpe[np.where(inside, positions, 0)])
        x[~inside] = 0
    return _store(x, out, x.dtype)


def last_rows(x: Array, attended: Array, starts: Array, *, out: tuple[Array, Array]) -> None:
    last = np.maximum(starts[1:] - 1, 0)
    out[0][...], out[1][...] = x[last], attended[last]


def bias_act(
    x: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    y = _wide(x) if bias is None else _wide(x) + _wide(bias)
    y = activate(y, activation)
    if residual is not None:
        y = y + residual
    return _store(y, out, x.dtype if residual is None else residual.dtype)


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
    shape = (*x.shape[:-1], len(weight))
    wide, matrix = _wide(x), _wide(_dense(weight, x.dtype))
    rows = math.prod(shape[:-1])
    y = product(wide.reshape(rows, x.shape[-1]), matrix, invariant=backend == "invariant").reshape(
        shape
    )
    if bias is not None:
        y += bias
    y = activate(y, activation)
    if residual is not None:
        y = y + residual
    return _store(y, out, x.dtype if residual is None else residual.dtype)


def ffn(
    x: Array,
    w1: Array,
    b1: Array | None,
    w2: Array,
    b2: Array | None,
    *,
    activation: str = "gelu_tanh",
    residual: Array | None = None,
    out: Array | None = None,
    scratch: Array | None = None,
) -> Array:
    hidden = linear(x, w1, b1, activation=activation)
    return linear(hidden, w2, b2, residual=residual, out=out)


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
    h = layer_norm(x, norm_weight, norm_bias, eps, out=h)
    return linear(h, weight, bias, activation=activation, out=out, backend=backend)


def shifted_bias(
    norm_bias: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None
) -> Array:
    y = linear(_wide(norm_bias)[None], weight, bias)[0]
    return _store(y, out, y.dtype)


def dequantize(matrix: QuantizedMatrix, dtype: Any, *, scratch: Array | None = None) -> Array:
    return host.dequantize(matrix, dtype)


def quantize(x: Array, *, out: QuantizedMatrix | None = None, first: int = 0) -> QuantizedMatrix:
    made = host.quantize(x)
    if out is None:
        return made
    rows = slice(first, first + len(x))
    out.values[rows], out.scales[:, rows] = made.values, made.scales
    return out
