"""Norms, activations, rotary embedding, softmax and lookup in plain NumPy, with their gradients.

Part of :mod:`.reference`: the oracle of kernels (float64 in, float64 through), and
what runs where there is no GPU. Leading dimensions are any; C is the last.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

Array = Any


def wide(array: Array) -> Array:
    """The array in the precision that sums are kept in."""
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def store(value: Array, out: Array | None, dtype: Any) -> Array:
    if out is None:
        return value.astype(dtype, copy=False)
    out[...] = value
    return out


def _elem(x: Array, weight: Array | None) -> Any:
    return x.dtype if weight is None else weight.dtype


def _scaled(n: Array, weight: Array | None, bias: Array | None = None) -> Array:
    if weight is not None:
        n = n * wide(weight)
    return n if bias is None else n + wide(bias)


def _centred(x: Array, eps: float) -> tuple[Array, Array]:
    """(x - mean) / sigma, and 1 / sigma."""
    x = wide(x)
    x = x - _mean(x)
    scale = 1 / np.sqrt(_mean(x * x) + x.dtype.type(eps))
    return x * scale, scale


def _mean(x: Array) -> Array:
    # A row without channels has no mean; nothing is stored of it either.
    return np.add.reduce(x, axis=-1, keepdims=True) / x.dtype.type(max(x.shape[-1], 1))


def layer_norm(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    x_wide = wide(x)
    centred = x_wide - _mean(x_wide)
    variance = _mean(centred * centred)
    n = centred / np.sqrt(variance + x_wide.dtype.type(eps))
    return store(_scaled(n, weight, bias), out, _elem(x, weight))


def rms_norm(
    x: Array, weight: Array | None, eps: float = 1e-6, *, out: Array | None = None
) -> Array:
    x_wide = wide(x)
    n = x_wide / np.sqrt(_mean(x_wide * x_wide) + x_wide.dtype.type(eps))
    return store(_scaled(n, weight), out, _elem(x, weight))


def _total(x: Array, residual: Array, out: tuple[Array | None, Array | None] | None) -> Array:
    return store(wide(residual) + wide(x), None if out is None else out[1], residual.dtype)


def add_layer_norm(
    x: Array,
    residual: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float = 1e-5,
    *,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    dtype = _elem(x, weight)
    total = _total(x, residual, out)
    y = layer_norm(total, weight, bias, eps)
    return store(y, None if out is None else out[0], dtype), total


def add_rms_norm(
    x: Array,
    residual: Array,
    weight: Array | None,
    eps: float = 1e-6,
    *,
    out: tuple[Array | None, Array | None] | None = None,
) -> tuple[Array, Array]:
    dtype = _elem(x, weight)
    total = _total(x, residual, out)
    y = rms_norm(total, weight, eps)
    return store(y, None if out is None else out[0], dtype), total


def layer_norm_backward(
    dy: Array, x: Array, weight: Array | None, eps: float = 1e-5
) -> tuple[Array, Array, Array]:
    n, scale = _centred(x, eps)
    g = _scaled(wide(dy), weight)
    dx = (g - _mean(g) - n * _mean(g * n)) * scale
    dweight, dbias = _row_sums(wide(dy) * n), _row_sums(wide(dy))
    elem = _elem(x, weight)
    return dx.astype(x.dtype), dweight.astype(elem), dbias.astype(elem)


def rms_norm_backward(
    dy: Array, x: Array, weight: Array | None, eps: float = 1e-6
) -> tuple[Array, Array]:
    x_wide = wide(x)
    scale = 1 / np.sqrt(_mean(x_wide * x_wide) + x_wide.dtype.type(eps))
    n = x_wide * scale
    g = _scaled(wide(dy), weight)
    dx = (g - n * _mean(g * n)) * scale
    return dx.astype(x.dtype), _row_sums(wide(dy) * n).astype(_elem(x, weight))


def _row_sums(x: Array) -> Array:
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1]).sum(axis=0)


def activate(x: Array, activation: str | None) -> Array:
    """Apply an activation by name; None is the identity."""
    if activation is None:
        return x
    if activation == "gelu_tanh":
        inner = x * x
        inner *= 0.044715
        inner += 1
        inner *= x
        inner *= math.sqrt(2 / math.pi)
        np.tanh(inner, out=inner)
        inner += 1
        inner *= x
        inner *= 0.5
        return inner
    if activation == "gelu_erf":
        return 0.5 * x * (1 + _erf(x * x.dtype.type(math.sqrt(0.5))))
    if activation == "relu":
        return np.maximum(x, 0)
    if activation == "silu":
        # exp of a large positive number overflows to inf, and x / inf is the right 0.
        with np.errstate(over="ignore"):
            return x / (1 + np.exp(-x))
    if activation == "tanh":
        return np.tanh(x)
    raise ValueError(f"unknown activation {activation!r}")


_erf_scalar: Any = np.frompyfunc(math.erf, 1, 1)


def _erf(x: Array) -> Array:
    # NumPy has no erf; the standard library's is exact to double precision.
    return _erf_scalar(x).astype(x.dtype)


def gelu(x: Array, approximate: str = "none", *, out: Array | None = None) -> Array:
    return bias_gelu(x, None, approximate, out=out)


def bias_gelu(
    x: Array, bias: Array | None, approximate: str = "none", *, out: Array | None = None
) -> Array:
    y = wide(x) if bias is None else wide(x) + wide(bias)
    # A copy, since the activation may work in place on what it is given.
    y = activate(y.copy(), "gelu_tanh" if approximate == "tanh" else "gelu_erf")
    return store(y, out, x.dtype)


def silu_mul(gate: Array, up: Array, *, out: Array | None = None) -> Array:
    return store(activate(wide(gate), "silu") * wide(up), out, gate.dtype)


def rope(
    x: Array,
    cosines: Array,
    sines: Array,
    positions: Array | None = None,
    *,
    interleaved: bool = False,
    out: Array | None = None,
) -> Array:
    tokens = x.shape[:-2]
    if positions is None:
        positions = np.arange(math.prod(tokens)).reshape(tokens)
    half = cosines.shape[1]
    inside = (positions >= 0) & (positions < len(cosines))
    row = np.where(inside, positions, 0)
    # One angle for all heads of a token; a position outside the tables gives zeros.
    exact = np.float64 if x.dtype == np.float64 else np.float32
    shown = inside[..., None, None]
    cos = np.where(shown, cosines[row][..., None, :], 0).astype(exact)
    sin = np.where(shown, sines[row][..., None, :], 0).astype(exact)
    y = np.where(shown, wide(x), 0)
    if interleaved:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = y[..., first].copy(), y[..., second].copy()
    y[..., first] = a * cos - b * sin
    y[..., second] = b * cos + a * sin
    return store(y, out, x.dtype)


def softmax(x: Array, *, out: Array | None = None) -> Array:
    x_wide = wide(x)
    if x.size:
        top = x_wide.max(axis=-1, keepdims=True)
        # Of a row of -inf alone every weight is 0, and 0 / 0 no number, as in PyTorch.
        with np.errstate(invalid="ignore"):
            e = np.exp(x_wide - np.where(np.isneginf(top), 0, top))
            x_wide = e / e.sum(axis=-1, keepdims=True)
    return store(x_wide, out, x.dtype)


def lookup(ids: Array, table: Array, *, out: Array | None = None) -> Array:
    inside = (ids >= 0) & (ids < len(table))
    # An empty table has no row 0 to take for ids outside it.
    rows = table if len(table) else np.zeros((1, table.shape[1]), table.dtype)
    y = rows[np.where(inside, ids, 0)]
    y[~inside] = 0
    return store(y, out, table.dtype)
