"""Attention over given keys and values. Kernels: attention.cu and others, decode_attention*.cu."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from .core.compiler import constants
from .core.device import current_device, has_mma, has_wgmma, shared_limit, sm_count
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written
from .reference_attention import (
    Facts,
    check_counts,
    check_given,
    check_heads,
    check_offset,
    facts,
    scale_of,
)

Array = Any

_HEADS_BYTES = 32 << 20  # of keys and values that blocks read at a time: they stay in L2
_TILE = 128  # rows of a tile of attention_tma
_ITEM = 0.8  # what a tile of queries takes beside its tiles of keys, in such tiles
_WAVES = 3  # of blocks of decode_attention, at most: each part takes a merge
_MOST_SPLITS = 64  # of the keys of a sequence
_FULLER = 1.02  # how much fuller waves must be to be worth more parts

_ATTENTION = (
    "q: ELEM[B,T,NH,HS]@, k: ELEM[B,S,NKV,HS]@, v: ELEM[B,S,NKV,HS]@, lengths: int32[B]?, "
    "offsets: int32[B]?, out: ELEM[B,T,NH,HS]!@, scale: float, causal: int, offset: int, "
    "together: int, B, T, S, NH, NKV, q_stride_B, q_stride_T, q_stride_NH, k_stride_B, "
    "k_stride_S, k_stride_NKV, v_stride_B, v_stride_S, v_stride_NKV, out_stride_B, "
    "out_stride_T, out_stride_NH"
)
ATTENTION = Kernel("attention.cu", "attention", _ATTENTION)
ATTENTION_MMA = Kernel("attention_mma.cu", "attention_mma", _ATTENTION)
ATTENTION_WGMMA = Kernel("attention_wgmma.cu", "attention_wgmma", _ATTENTION)
ATTENTION_TMA = Kernel(
    "attention_wgmma.cu",
    "attention_tma",
    f"{_ATTENTION}, q_tiles: tiles[q,{_TILE}], k_tiles: tiles[k,{_TILE}], "
    f"v_tiles: tiles[v,{_TILE}]",
)
ATTENTION_SPLIT = Kernel(
    "attention_split.cu", "attention_split", _ATTENTION.replace("ELEM", "float32")
)
_DECODE = (
    "q: ELEM[B,NH,HS]@, k_cache: ELEM[B,T,NKV,HS]@, v_cache: ELEM[B,T,NKV,HS]@, "
    "lengths: int32[B], out: ELEM[B,NH,HS]!@, states: float32[B,NH,P,H2]?, scale: float, T, NH, "
    "NKV, q_stride_B, q_stride_NH, k_cache_stride_B, k_cache_stride_T, k_cache_stride_NKV, "
    "v_cache_stride_B, v_cache_stride_T, v_cache_stride_NKV, out_stride_B, out_stride_NH"
)
DECODE = Kernel("decode_attention.cu", "decode_attention", _DECODE)
DECODE_MMA = Kernel("decode_attention_mma.cu", "decode_attention_mma", _DECODE)
DECODE_MERGE = Kernel(
    "decode_attention.cu",
    "decode_attention_merge",
    "states: float32[B,NH,P,H2], out: ELEM[B,NH,HS]!@, NH, P, out_stride_B, out_stride_NH",
)


class _Plan(NamedTuple):
    """How a call is launched."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    scale: float
    together: int = 1  # heads


def _check_aligned(where: str, **arrays: Facts | None) -> None:
    """Refuse strides that are no multiple of 16 bytes, and an output that overlaps itself."""
    for name, each in arrays.items():
        if each is None:
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


@functools.lru_cache(4096)
def _plan(
    device: int,
    q: Facts,
    k: Facts,
    v: Facts,
    out: Facts | None,
    causal: bool,
    scale: float | None,
    whole: bool,
) -> _Plan:
    """Everything that follows from the layouts of a call, checked."""
    check_heads(q, k, v, "BTNH", "attention")
    _check_aligned("attention", q=q, k=k, v=v, out=out)
    factor = scale_of(scale, q.shape[-1], "attention")
    batch, queries, heads, size = q.shape
    wide = q.dtype == np.float32
    warpgroups = has_wgmma()
    if warpgroups:
        kernel = ATTENTION_SPLIT if wide else ATTENTION_WGMMA
        if not wide and whole and all(map(_in_tiles, (q, k, v))):
            kernel = ATTENTION_TMA
        c = constants(kernel.source, HS=size)
        threads, shared = c["THREADS"], c["SHARED_BYTES"]
    elif has_mma():
        c = constants("attention_mma.cu", HS=size)
        kernel, threads = ATTENTION_MMA, c["THREADS"]
        shared = c.evaluate("SHARED_BYTES", 3 if wide else 1)
    else:
        c = constants("attention.cu", HS=size)
        kernel, threads, shared = ATTENTION, c["SIDE"] * c["SIDE"], 0
    tiles = -(-queries // c["BR"])
    blocks = items = tiles * batch * heads
    together = 1
    if warpgroups:
        blocks = min(items, sm_count())
    if causal:
        pair = 2 * k.shape[1] * size * k.dtype.itemsize
        most = min(max(_HEADS_BYTES // max(pair, 1), 1), batch * heads)
        seen = np.minimum(np.arange(1, tiles + 1) * c["BR"], k.shape[1]) / _TILE + _ITEM
        together = _together(seen, batch * heads, blocks, most) if warpgroups else most
    return _Plan(kernel, (blocks,), (threads,), shared, factor, together)


def _in_tiles(array: Facts) -> bool:
    """Whether the copy engine can read an array in whole tiles."""
    _, tokens, _, size = array.shape
    apart = all(
        stride for count, stride in zip(array.shape, array.strides, strict=True) if count > 1
    )
    return apart and bool(tokens) and not (tokens % _TILE or size % 64)


def _together(costs: np.ndarray, heads: int, blocks: int, most: int) -> int:
    """How many heads are dealt with at a time, so that all blocks end at about the same time.

    ``costs`` are those of the tiles of a head. Items go to the blocks as attention_wgmma.cu deals
    them out: in turn, forth and back, of some heads the last tiles first.
    """
    tiles = len(costs)
    number = np.arange(tiles * heads)
    turn, place = np.divmod(number, max(blocks, 1))
    block = np.where(turn % 2, blocks - 1 - place, place)

    def longest(together: int) -> float:
        group, rest = np.divmod(number, together * tiles)
        tile = tiles - 1 - rest // np.minimum(together, heads - group * together)
        return float(np.bincount(block, costs[tile]).max(initial=0))

    choices = [together for together in (1, 2, 4, 8, 16, 32, 64) if together < most]
    return min([*choices, max(most, 1)], key=longest)


def _attention_cost(
    q: Array, k: Array, v: Array, causal: bool, q_offset: Any, out: Array | None
) -> Cost:
    """Every key as long as the array is; of q_offset only a number counts."""
    batch, queries, heads, size = q.shape
    keys = k.shape[1]
    pairs = queries * keys
    if causal:
        first = int(q_offset) if np.ndim(q_offset) == 0 else 0
        seen = np.minimum(first + 1 + np.arange(queries, dtype=np.int64), keys)
        pairs = int(seen.sum())
    flops = 4 * batch * heads * size * pairs
    return Cost(moved(q, k, v) + written(out, q.size, q.dtype), flops)


@op(reference="reference_attention.attention", cost=_attention_cost, only_launches=True)
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
    """``softmax(scale * q . k) v`` over the keys that a query sees, for each head.

    Parameters
    ----------
    q : array [B, T, NH, HS]
        T queries of B sequences in NH heads of HS channels, a multiple of 8 up to 128.
    k, v : array [B, S, NKV, HS]
        Keys and values. NKV divides NH: query head h reads head ``h // (NH // NKV)``.
    causal : bool
        Whether query t sees only the keys up to position ``q_offset + t``.
    scale : float, optional
        Positive factor on the scores; 1 / sqrt(HS) by default.
    lengths : array of int32 [B], optional
        Keys of each sequence, the first of its S; all by default. Those outside 0 to S
        count as the nearest of the two.
    q_offset : int or array of int32 [B]
        Position of the first query among the keys, where ``causal``. S - T lets the last
        query see all keys. An int is a part of the launch; an array may change in a
        captured graph.
    out : array [B, T, NH, HS], optional
        Of q's dtype; shares no memory with the others.

    Returns
    -------
    array [B, T, NH, HS]
        Of q's dtype; sums are in float32. A query that sees no key gives zeros.

    Raises
    ------
    InputError
        For shapes or dtypes that do not fit each other, another head size, a scale that is
        not positive, or an offset without ``causal``; on the GPU also for channels that do
        not lie together, strides that are no multiple of 16 bytes, another device, and an
        ``out`` that overlaps an input.

    Notes
    -----
    Arrays may have any strides but of the channels: heads before tokens, as PyTorch has
    them, is ``q.transpose(0, 2, 1, 3)``, and nothing is copied. Memory beside the arrays
    does not grow with T or S: no T x S matrix exists. float32 is computed to float32
    accuracy, on tensor cores by split products. The bits of a query do not depend on the
    other sequences. A value that a query does not see may count with a weight of zero, so it
    must be finite; what lies behind ``lengths`` is not read.

    Dao et al., "FlashAttention", 2022; Shah et al., "FlashAttention-3", 2024.
    """
    of = [facts(n, a, "attention") for n, a in (("q", q), ("k", k), ("v", v))]
    of_out = None if out is None else facts("out", out, "attention")
    plan = _plan(current_device(), *of, of_out, causal, scale, lengths is None)
    if out is None:
        out = device_empty(q.shape, q.dtype)
    offsets, offset = None, q_offset
    if lengths is not None:
        check_counts("lengths", lengths, q.shape[0], "attention")
    if type(q_offset) is not int or q_offset:
        check_offset(q_offset, causal, q.shape[0], "attention")
        if np.ndim(q_offset):
            offsets, offset = q_offset, 0
        else:  # further on nothing changes
            offset = min(int(q_offset), k.shape[1])
    launch(
        plan.kernel,
        plan.grid,
        plan.block,
        (q, k, v, lengths, offsets, out, plan.scale, int(causal), offset, plan.together),
        elem=q.dtype,
        head_size=q.shape[-1],
        shared=plan.shared,
    )
    return out


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
    kernel = DECODE
    if dtype != np.float32 and has_mma():
        kernel = DECODE_MMA
    c = constants(kernel.source, HS=size)
    if kernel is DECODE:
        of_warp = max(c.evaluate("WARP_BYTES", dtype.itemsize), c["STATE_BYTES"])
        static = c["MOST_HEADS"] * size * 4
    else:
        of_warp, static = max(c["STAGES"] * c["STAGE_BYTES"], c["STATE_BYTES"]), 0
    of_warp = -(-of_warp // 128) * 128
    warps = c["MOST_WARPS"]
    while warps * of_warp + static > shared_limit():
        warps //= 2
    share = heads // max(kv, 1)
    blocks = kv * -(-share // c["MOST_HEADS"])
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
    check_heads(q, k, v, "BNH", "decode_attention")
    _check_aligned("decode_attention", q=q, k_cache=k, v_cache=v, out=out)
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


@op(reference="reference_attention.decode_attention", cost=_decode_cost, only_launches=True)
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
        ``gpt2cupy.ops.attention.scratch_shape``; made where it is not given.

    Returns
    -------
    array [B, NH, HS]
        Of q's dtype; sums are in float32. A sequence without tokens gives zeros.

    Raises
    ------
    InputError
        As :func:`attention` does.

    Notes
    -----
    Arrays may have any strides but of the channels, as :func:`attention`'s. A sequence is
    split over so many blocks that all of them keep the memory busy; their number follows
    from the shapes, and their results are merged in one order, so the bits are the same
    in every run.

    Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    where = "decode_attention"
    of = [facts(n, a, where) for n, a in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache))]
    of_out = None if out is None else facts("out", out, where)
    factor = _decode_scale(current_device(), *of, of_out, scale)
    check_given(lengths, len(q))
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
