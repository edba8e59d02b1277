"""Attention over given keys and values. Kernels: attention.cu, _mma, _wgmma, _split."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from .core.cuda_source import constants
from .core.device import current_device, has_mma, has_wgmma, sm_count
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written
from .reference_attention import (
    Facts,
    check_aligned,
    check_heads,
    check_offset,
    facts,
    scale_of,
)

Array = Any

_HEADS_BYTES = 32 << 20  # of keys and values that blocks read at a time: they stay in L2
_TILE = 128  # rows of a tile of attention_tma
_ITEM = 0.8  # what a tile of queries takes beside its tiles of keys, in such tiles

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


class _Plan(NamedTuple):
    """How a call is launched."""

    kernel: Kernel
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    scale: float
    together: int = 1  # heads


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
    check_heads(q, k, "attention")
    check_aligned("attention", q=q, k=k, v=v, out=out)
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


@op(
    reference="reference_attention.attention",
    cost=_attention_cost,
    takes="q: real[B,T,NH,HS], k: @q[B,S,NKV,HS], v: @q[B,S,NKV,HS], causal: bool, "
    "scale: number?, lengths: int32[B]?, q_offset: any, out: @q[B,T,NH,HS]!",
    only_launches=True,
)
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
        not positive, an offset without ``causal``, or an ``out`` that overlaps an input; on the
        GPU also for channels that do not lie together, strides that are no multiple of 16
        bytes, or another device.

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
    of_out = None if out is None else facts(out)
    plan = _plan(
        current_device(), facts(q), facts(k), facts(v), of_out, causal, scale, lengths is None
    )
    if out is None:
        out = device_empty(q.shape, q.dtype)
    offsets, offset = None, q_offset
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
