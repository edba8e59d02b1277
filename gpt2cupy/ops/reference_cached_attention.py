"""The ops on the cache in plain NumPy: attention of prompts and steps, keys and values kept."""

from __future__ import annotations

from typing import Any

import numpy as np

from .reference_rows import wide as _wide

Array = Any


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
