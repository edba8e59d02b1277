"""Attention of one token a sequence over its cache. Kernels: decode_attention*.cu."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .core.cuda_source import constants
from .core.device import current_device, has_mma, shared_limit, sm_count
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written
from .reference_attention import (
    Facts,
    check_aligned,
    check_heads,
    facts,
    scale_of,
)

Array = Any

_WAVES = 3  # of blocks, at most: each part of a sequence takes a merge
_MOST_SPLITS = 64  # of the keys of a sequence
_FULLER = 1.02  # how much fuller waves must be to be worth more parts

_DECODE = (
    "q: ELEM[B,NH,HS]@, k_cache: ELEM[B,T,NKV,HS]@, v_cache: ELEM[B,T,NKV,HS]@, "
    "lengths: int32[B], out: ELEM[B,NH,HS]!@, states: float32[B,NH,P,H2]?, scale: float, T, NH, "
    "NKV, q_stride_B, q_stride_NH, k_cache_stride_B, k_cache_stride_T, k_cache_stride_NKV, "
    "v_cache_stride_B, v_cache_stride_T, v_cache_stride_NKV, out_stride_B, out_stride_NH"
)
# By the query heads of a block.
DECODE = {n: Kernel("decode_attention.cu", f"decode_attention_h{n}", _DECODE) for n in (1, 2, 4, 8)}
DECODE_MMA = Kernel("decode_attention_mma.cu", "decode_attention_mma", _DECODE)
DECODE_MERGE = Kernel(
    "decode_attention_merge.cu",
    "decode_attention_merge",
    "states: float32[B,NH,P,H2], out: ELEM[B,NH,HS]!@, NH, P, out_stride_B, out_stride_NH",
)


class _Blocks(NamedTuple):
    """How decode_attention is dealt out to blocks."""

    kernel: Kernel
    grid: tuple[int, ...]
    warps: int
    shared: int
    states: tuple[int, ...] | None  # shape


@functools.lru_cache(4096)
def _blocks(device: int, q: tuple[int, ...], k: tuple[int, ...], dtype: Any) -> _Blocks:
    """So many that all multiprocessors have some to the end; it follows from the shapes alone."""
    batch, heads, size = q
    _, capacity, kv, _ = k
    share = heads // max(kv, 1)
    if dtype != np.float32 and has_mma():
        kernel = DECODE_MMA
        c = constants(kernel.source, HS=size)
        of_block = c["MOST_HEADS"]
        of_warp, static = max(c["STAGES"] * c["STAGE_BYTES"], c["STATE_BYTES"]), 0
    else:
        of_block = next((n for n in DECODE if n >= share), max(DECODE))
        kernel = DECODE[of_block]
        c = constants(kernel.source, HS=size)
        states_bytes = c.evaluate("STATE_BYTES", of_block)
        of_warp = max(c.evaluate("WARP_BYTES", dtype.itemsize), states_bytes)
        static = of_block * size * 4
    of_warp = -(-of_warp // 128) * 128
    warps = c["MOST_WARPS"]
    while warps * of_warp + static > shared_limit():
        warps //= 2
    blocks = kv * -(-share // of_block)
    resident = max(shared_limit() // (warps * of_warp + static), 1) * sm_count()
    # No part is so short that its warps have fewer than two tiles.
    longest = max(capacity // (2 * warps * c["KEYS"]), 1)
    splits = _splits(batch * blocks, resident, min(longest, _MOST_SPLITS))
    states = (batch, heads, splits, size + 2) if splits > 1 else None
    return _Blocks(kernel, (blocks, splits, batch), warps, warps * of_warp, states)


def _splits(blocks: int, resident: int, most: int) -> int:
    """Parts of the keys of a sequence: the fewest with which waves of blocks are nearly full."""

    def filled(splits: int) -> float:
        waves = -(-blocks * splits // resident)
        return blocks * splits / (waves * resident)

    best = 1
    for splits in range(2, min(most, _WAVES * resident // max(blocks, 1)) + 1):
        if filled(splits) > filled(best) * _FULLER:
            best = splits
    return best


@functools.lru_cache(4096)
def _decode_scale(
    device: int, q: Facts, k: Facts, v: Facts, out: Facts | None, scale: float | None
) -> float:
    """The factor on the scores of a call whose arrays fit each other."""
    check_heads(q, k, "decode_attention")
    check_aligned("decode_attention", q=q, k_cache=k, v_cache=v, out=out)
    return scale_of(scale, q.shape[-1], "decode_attention")


def scratch_shape(q: tuple[int, ...], k_cache: tuple[int, ...], dtype: Any) -> Any:
    """The shape of the float32 that :func:`decode_attention` takes as ``scratch``, or None.

    Parameters
    ----------
    q, k_cache : tuple of int
        Shapes of its arguments.
    dtype : numpy.dtype
        Theirs. The shape is that for the current device.
    """
    return _blocks(current_device(), q, k_cache, dtype).states


def _decode_cost(
    q: Array, k_cache: Array, lengths: Array, out: Array | None, context: float
) -> Cost:
    """Keys and values of ``context`` tokens a sequence, a mean over them."""
    cache = 2 * len(q) * context * k_cache.shape[2] * k_cache.shape[3] * k_cache.dtype.itemsize
    read = moved(q, lengths) + cache
    return Cost(read + written(out, q.size, q.dtype), 4 * q.size * context)


@op(
    reference="reference_attention.decode_attention",
    cost=_decode_cost,
    takes="q: real[B,NH,HS], k_cache: @q[B,T,NKV,HS], v_cache: @q[B,T,NKV,HS], "
    "lengths: int32[B], scale: number?, out: @q[B,NH,HS]!, scratch: any",
    only_launches=True,
)
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
    """Attention of one token a sequence over its cache, whose last key is the token's own.

    Parameters
    ----------
    q : array [B, NH, HS]
        NH heads of HS channels, a multiple of 8 up to 128.
    k_cache, v_cache : array [B, T, NKV, HS]
        T tokens of room. NKV divides NH: query head h reads head ``h // (NH // NKV)``, and
        heads that share one read it once.
    lengths : array of int32 [B]
        Tokens that are there; nothing beyond is read. Those outside 0 to T count as the
        nearest of the two.
    scale : float, optional
        Positive factor on the scores; 1 / sqrt(HS) by default.
    out : array [B, NH, HS], optional
        Of q's dtype; shares no memory with the others.
    scratch : array of float32, optional
        On a GPU what the parts of long sequences leave for each other, in the shape of
        ``gpt2cupy.ops.decode_attention.scratch_shape``; made where it is not given.

    Returns
    -------
    array [B, NH, HS]
        Of q's dtype; sums are in float32. A sequence without tokens gives zeros.

    Raises
    ------
    InputError
        As :func:`gpt2cupy.ops.attention` does.

    Notes
    -----
    Arrays may have any strides but of the channels, as :func:`gpt2cupy.ops.attention`'s. A
    sequence is split over so many blocks that all of them keep the memory busy; their number
    follows from the shapes, and their results are merged in one order, so the bits are the
    same in every run.

    Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    of_out = None if out is None else facts(out)
    of = facts(q), facts(k_cache), facts(v_cache)
    factor = _decode_scale(current_device(), *of, of_out, scale)
    kernel, grid, warps, shared, shape = _blocks(current_device(), q.shape, k_cache.shape, q.dtype)
    if out is None:
        out = device_empty(q.shape, q.dtype)
    states = device_empty(shape, np.float32) if shape and scratch is None else scratch
    if not shape:
        states = None
    sizes = {"elem": q.dtype, "head_size": q.shape[-1]}
    args = (q, k_cache, v_cache, lengths, out, states, factor)
    launch(kernel, grid, (32 * warps,), args, shared=shared, **sizes)
    if states is not None:
        groups = constants(DECODE_MERGE.source, HS=q.shape[-1])["MERGE_GROUPS"]
        block = (groups * q.shape[-1],)
        launch(DECODE_MERGE, q.shape[1::-1], block, (states, out), **sizes)
    return out
