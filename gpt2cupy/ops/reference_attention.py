"""Attention over given keys and values in plain NumPy: part of :mod:`.reference`."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError, shown
from .reference_rows import store, wide

Array = Any

HEAD_SIZES = range(8, 129, 8)


class Facts(NamedTuple):
    """What of an array decides whether an op takes it, and by which kernel."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: Any


def facts(array: Array) -> Facts:
    """The facts of an argument."""
    return Facts(array.shape, array.strides, array.dtype)


def check_heads(q: Facts, k: Facts, where: str) -> None:
    """Refuse heads that no kernel takes, or that do not fit each other."""
    size, heads, kv = q.shape[-1], q.shape[-2], k.shape[2]
    if size not in HEAD_SIZES:
        raise InputError(
            f"q has heads of {size} channels",
            where=f"{where}: q",
            remedy="Kernels take multiples of 8 up to 128: pad q, k and v with zeros, and give "
            "the scale of the size that it was.",
        )
    if heads and (not kv or heads % kv):
        raise InputError(
            f"k has {kv} heads, of which the {heads} of q are no multiple",
            where=f"{where}: k",
            remedy="Each key head serves as many query heads.",
        )


def check_aligned(where: str, **arrays: Facts | None) -> None:
    """Refuse what no kernel takes.

    These are float64, strides that are no multiple of 16 bytes, and an output that overlaps itself.
    """
    for name, each in arrays.items():
        if each is None:
            continue
        if each.dtype == np.float64:
            raise InputError(
                f"{name} is of float64, which NumPy alone computes in",
                where=f"{where}: {name}",
                remedy="Give all arrays in one of float32, float16 and bfloat16.",
            )
        if 0 in each.shape:  # whatever strides it has, they lead nowhere
            continue
        leading = [s for n, s in zip(each.shape[:-1], each.strides, strict=False) if n > 1]
        if any(stride % 16 for stride in leading):
            raise InputError(
                f"{name} has strides of {list(each.strides)} bytes",
                where=f"{where}: {name}",
                remedy="Kernels read 16 bytes at a time: make the strides multiples of that, or "
                "copy the array.",
            )
        if name == "out" and 0 in leading:
            raise InputError(
                "out has a stride of 0: its elements share memory",
                where=f"{where}: out",
                remedy="Give an output whose elements have memory of their own.",
            )


def scale_of(scale: float | None, head_size: int, where: str) -> float:
    """The factor on the scores."""
    if scale is None:
        return 1 / math.sqrt(head_size)
    if not (isinstance(scale, (int, float, np.floating, np.integer)) and 0 < scale < math.inf):
        raise InputError(
            f"{shown(scale)} is no factor of scores",
            where=f"{where}: scale",
            remedy="Give a positive number, or None for 1 / sqrt(channels).",
        )
    return float(scale)


def check_offset(q_offset: Any, causal: bool, batch: int, where: str) -> None:
    """Refuse an offset that is no position, or that nothing would use."""
    one = isinstance(q_offset, (int, np.integer)) and not isinstance(q_offset, bool)
    if one and not 0 <= q_offset < 2**31:
        raise InputError(
            f"{shown(q_offset)} is no position",
            where=f"{where}: q_offset",
            remedy="Give the position of the first query among the keys: 0 or more.",
        )
    found = getattr(q_offset, "dtype", None), getattr(q_offset, "shape", None)
    if not one and found != (np.int32, (batch,)):
        raise InputError(
            f"q_offset is {shown(q_offset)}",
            where=f"{where}: q_offset",
            remedy=f"Give a position, or an array of int32 [{batch}]: one for each sequence.",
        )
    if not causal and not (one and q_offset == 0):
        raise InputError(
            "q_offset is given where all queries see all keys",
            where=f"{where}: q_offset",
            remedy="Leave it out, or set causal=True.",
        )


def _softmax(scores: Array) -> Array:
    """Over the last dimension; zeros where all is minus infinity."""
    largest = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isneginf(largest), 0, largest))
    total = weights.sum(axis=-1, keepdims=True)
    return weights / np.where(total == 0, 1, total)


def _attend(q: Array, k: Array, v: Array, scale: float, hidden: Array | None) -> Array:
    """One sequence: q [T, NH, HS], k and v [S, NKV, HS] -> [T, NH, HS]."""
    queries, heads, size = q.shape
    kv = k.shape[1]
    # Query heads that share keys beside each other: [NKV, share, T, HS].
    grouped = q.transpose(1, 0, 2).reshape(kv, heads // kv, queries, size)
    scores = grouped @ k.transpose(1, 2, 0)[:, None] * q.dtype.type(scale)
    if hidden is not None:
        scores[..., hidden] = -np.inf
    context = _softmax(scores) @ v.transpose(1, 0, 2)[:, None]
    return context.reshape(heads, queries, size).transpose(1, 0, 2)


def attention(
    q: Array,
    k: Array,
    v: Array,
    causal: bool = False,
    scale: float | None = None,
    lengths: Array | None = None,
    q_offset: Any = 0,
    *,
    out: Array | None = None,
) -> Array:
    check_heads(facts(q), facts(k), "attention")
    batch, queries = q.shape[:2]
    check_offset(q_offset, causal, batch, "attention")
    factor = scale_of(scale, q.shape[-1], "attention")
    result = np.zeros(q.shape, wide(q).dtype)
    for b in range(batch if q.size else 0):
        keys = k.shape[1] if lengths is None else min(max(int(lengths[b]), 0), k.shape[1])
        if not keys:
            continue
        first = int(q_offset if np.ndim(q_offset) == 0 else q_offset[b])
        hidden = None
        if causal:
            hidden = np.arange(keys) > np.arange(first, first + queries)[:, None]
        result[b] = _attend(wide(q[b]), wide(k[b, :keys]), wide(v[b, :keys]), factor, hidden)
    return store(result, out, q.dtype)


def decode_attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    lengths: Array,
    scale: float | None = None,
    *,
    out: Array | None = None,
    scratch: Array | None = None,
) -> Array:
    check_heads(facts(q), facts(k_cache), "decode_attention")
    found = attention(
        q[:, None],
        k_cache,
        v_cache,
        False,
        scale,
        lengths,
        out=None if out is None else out[:, None],
    )
    return found[:, 0] if out is None else out
