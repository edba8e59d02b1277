"""Every op in plain NumPy: the oracle (float64 in, float64 through) and the CPU engine (float32).

Letters: N rows (packed tokens), B batch, T tokens, C channels, NH heads, HS head
size, K and M the inner and outer size of a GEMM, S cache slots. Inputs
narrower than float32 are computed in float32, as the kernels do.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Any

import numpy as np

from .. import quantize as host
from ..quantize import QuantizedMatrix
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


# Inputs of a GEMM that BLAS sums at a time. It may keep one running sum over all of them
# (OpenBLAS does, MKL does not); summing parts apart brings the rounding error down by a third.
PART: ContextVar[int] = ContextVar("PART", default=128)
# OpenBLAS multiplies matrices of so few results and multiplications as they lie; larger ones it
# packs first, which takes three times as long where one of them has 8 rows.
_UNPACKED = 1024, 10**6
_LEAST = 16  # rows of weights at a time for which that pays


def _product(x: Array, weight: Array, backend: str) -> Array:
    """``x @ weight.T``, summed in parts of the inner size."""
    if len(x) == 1:
        # The GEMV streams the rows as they lie, in many sums at once.
        return (weight @ x[0])[None]
    if backend == "invariant":
        return np.stack([weight @ row for row in x])
    part, rows = PART.get(), _unpacked_rows(*x.shape)
    if part < x.shape[1] and rows >= _LEAST:
        y = np.empty((len(x), len(weight)), np.result_type(x, weight))
        for start in range(0, len(weight), rows):
            y[:, start : start + rows] = x @ weight[start : start + rows].T
        return y
    y = x[:, :part] @ weight[:, :part].T
    for start in range(part, x.shape[1], part):
        y += x[:, start : start + part] @ weight[:, start : start + part].T
    return y


def _unpacked_rows(rows: int, size: int) -> int:
    """Rows of weights that OpenBLAS multiplies by so many of x without packing them."""
    results, products = _UNPACKED
    return min(results, products // max(size, 1)) // rows // _LEAST * _LEAST if rows else 0


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
    y = _product(wide.reshape(rows, x.shape[-1]), matrix, backend).reshape(shape)
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
    backend: str = "auto",
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


def _heads(qkv: Array, n_head: int, head_size: int) -> tuple[Array, Array, Array]:
    """Split rows of [q | k | v] into three [NH, N, HS] views."""
    split = _wide(qkv).reshape(len(qkv), 3, n_head, head_size)
    q, k, v = split.transpose(1, 2, 0, 3)
    return q, k, v


def _attend(q: Array, k: Array, v: Array, scale: float, first: int) -> Array:
    """Causal attention of T queries at positions first.. over keys 0..; [NH, T, HS]."""
    scores = (q @ k.transpose(0, 2, 1)) * q.dtype.type(scale)
    queries, keys = scores.shape[1:]
    if queries > 1:
        future = np.arange(keys) > np.arange(first, first + queries)[:, None]
        scores[:, future] = -np.inf
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores @ v


def attention_prefill(
    qkv: Array,
    k: Array,
    v: Array,
    starts: Array,
    slots: Array,
    past: Array,
    longest: int,
    scale: float,
    *,
    out: Array | None = None,
    batch_invariant: bool = False,
) -> Array:
    _, n_head, _, head_size = k.shape
    if out is None:
        out = np.empty((len(qkv), n_head * head_size), qkv.dtype)
    for row, slot in enumerate(slots):
        begin, end, first = int(starts[row]), int(starts[row + 1]), int(past[row])
        if begin == end:
            continue
        q, new_k, new_v = _heads(qkv[begin:end], n_head, head_size)
        last = first + end - begin
        k[slot, :, first:last] = new_k
        v[slot, :, first:last] = new_v
        # The order of BLAS's sums depends on the sizes: a query by itself has always the same.
        step = 1 if batch_invariant else end - begin
        for at in range(begin, end, step):
            seen = first + at - begin + step
            keys, values = _wide(k[slot, :, :seen]), _wide(v[slot, :, :seen])
            queries = q[:, at - begin : at - begin + step]
            context = _attend(queries, keys, values, scale, seen - step)
            out[at : at + step] = context.transpose(1, 0, 2).reshape(step, -1)
    return out


def attention_decode(
    qkv: Array,
    k: Array,
    v: Array,
    slots: Array,
    positions: Array,
    scale: float,
    *,
    out: Array | None = None,
    batch_invariant: bool = False,
) -> Array:
    _, n_head, capacity, head_size = k.shape
    if out is None:
        out = np.empty((len(qkv), n_head * head_size), qkv.dtype)
    q, new_k, new_v = _heads(qkv, n_head, head_size)
    for row, slot in enumerate(slots):
        position = int(positions[row])
        if slot < 0 or not 0 <= position < capacity:
            out[row] = 0
            continue
        k[slot, :, position] = new_k[:, row]
        v[slot, :, position] = new_v[:, row]
        keys, values = _wide(k[slot, :, : position + 1]), _wide(v[slot, :, : position + 1])
        out[row] = _attend(q[:, row, None], keys, values, scale, position).reshape(-1)
    return out


def copy_slots(k: Array, v: Array, sources: Array, targets: Array, counts: Array) -> None:
    for source, target, count in zip(sources, targets, counts, strict=True):
        for cache in (k, v):
            cache[:, target, :, :count] = cache[:, source, :, :count]


def store_kv(qkv: Array, k: Array, v: Array, slots: Array, positions: Array) -> None:
    _, n_head, capacity, head_size = k.shape
    _, new_k, new_v = _heads(qkv, n_head, head_size)
    for row, (slot, position) in enumerate(zip(slots, positions, strict=True)):
        if slot >= 0 and 0 <= position < capacity:
            k[slot, :, position] = new_k[:, row]
            v[slot, :, position] = new_v[:, row]
