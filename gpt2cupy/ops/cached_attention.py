"""Attention over the cache, for prompts and for single tokens. Kernels: attention_*.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from .core.device import has_clusters, has_mma, sm_count
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_DECODE_WARPS, _MANY_WARPS = 8, 4  # MOST_WARPS and FEWEST_WARPS in attention_decode.cu
_STREAM_STAGES = 2  # STAGES in attention_decode_rows.cu
_INVARIANT_SPLIT = 2  # blocks of a head with batch_invariant: half-way between one row and many
_MANY_PER_SM = 2  # blocks of a multiprocessor; where there would be more, they are smaller
_FULL_PER_SM = 4  # where there would be even more, those of attention_decode_rows.cu have two warps
_MMA_QUERIES, _MMA_GROUPS, _MMA_THREADS = 64, 2, 256  # BR, GROUPS, threads in ..._mma.cu
_PREFILL_THREADS = 256  # SIDE x SIDE in attention_prefill.cu

_PREFILL = (
    "qkv: ELEM[N,C3], k: ELEM[S,NH,T,HS], v: ELEM[S,NH,T,HS], starts: int32[R1], "
    "slots: int32[R], past: int32[R], out: ELEM[N,C], scale: float, NH, T"
)
ATTENTION_PREFILL = Kernel("attention_prefill.cu", "attention_prefill", _PREFILL)
ATTENTION_NAIVE = Kernel("attention_prefill.cu", "attention_naive", _PREFILL)
ATTENTION_PREFILL_MMA = Kernel(
    "attention_prefill_mma.cu", "attention_prefill_mma", _PREFILL, overlaps=True
)
_DECODE = (
    "qkv: ELEM[B,C3], k: ELEM[S,NH,T,HS], v: ELEM[S,NH,T,HS], slots: int32[B], "
    "positions: int32[B], out: ELEM[B,C], scale: float, NH, T"
)


def _decode_kernel(source: str, ending: str) -> Kernel:
    entry = source.removesuffix(".cu") + ending
    return Kernel(source, entry, _DECODE, overlaps=True)


# By the number of blocks that share a head.
_BLOCKS = {1: "", 2: "_2", 4: "_4", 8: "_8"}
ATTENTION_DECODE = {n: _decode_kernel("attention_decode.cu", e) for n, e in _BLOCKS.items()}
ATTENTION_DECODE_MMA = {n: _decode_kernel("attention_decode_mma.cu", e) for n, e in _BLOCKS.items()}
# One smaller block for each head of many rows; on tensor cores by its warps.
ATTENTION_DECODE_MANY = _decode_kernel("attention_decode.cu", "_many")
ATTENTION_DECODE_ROWS = {n: _decode_kernel("attention_decode_rows.cu", f"_{n}") for n in (2, 4)}


def _query_tile(head_size: int) -> int:
    """Queries of a block; BR in attention_prefill.cu."""
    return 64 if head_size <= 64 else 32


def _pitch(head_size: int) -> int:
    """Bytes of a key in shared memory; PITCH in mma.cuh."""
    return 2 * (head_size + (8 if head_size & (head_size - 1) else 0))


def _mma_shared(head_size: int) -> int:
    """Bytes of shared memory of attention_prefill_mma.cu: two tiles for each group of warps."""
    keys = 64 if head_size <= 64 else 32  # BC there
    handed = (4 + head_size // 2) * _MMA_THREADS // _MMA_GROUPS * 4
    return _MMA_GROUPS * max(2 * 2 * keys * _pitch(head_size), handed)


def _stream_shared(warps: int, head_size: int) -> int:
    """Bytes of shared memory of attention_decode_rows.cu: keys and values of each warp's turns."""
    keys = 32 if head_size <= 64 else 16  # KEYS there
    return warps * _STREAM_STAGES * 2 * keys * _pitch(head_size)


def _decode_cost(
    qkv: Array, slots: Array, positions: Array, out: Array | None, context: float
) -> Cost:
    """Keys and values of ``context`` earlier tokens per row, and the new ones written.

    The context is what each row's slot holds before the step; a mean over steps is right too,
    for the cost grows in proportion.
    """
    batch, channels = len(qkv), qkv.shape[1] // 3
    size = batch * channels
    cache = 2 * size * qkv.dtype.itemsize * (context + 1)
    read = moved(qkv, slots, positions) + cache
    return Cost(read + written(out, size, qkv.dtype), 4 * size * (context + 1))


@op(reference="reference.attention_prefill")
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
    """Causal attention of packed new tokens over their own cache, which it extends.

    Parameters
    ----------
    qkv : array [N, 3C]
        Rows of [q | k | v]; the tokens of R sequences one after another.
    k, v : array [S, NH, T, HS]
        One layer of the cache; the new keys and values are written to it.
    starts : array of int32 [R + 1]
        Sequence r owns the rows from ``starts[r]`` to ``starts[r + 1] - 1``.
    slots : array of int32 [R]
        Cache slot of each sequence.
    past : array of int32 [R]
        Tokens of each sequence that the cache holds already.
    longest : int
        Most new tokens of any sequence (the host must know it to size the grid).
    scale : float
        Factor on the scores.
    out : array [N, C], optional
    batch_invariant : bool
        Whether the bits of a token must not depend on the tokens beside it. On the GPU
        they never do: its sums go along the absolute positions of the keys.

    Returns
    -------
    array [N, C]
        Of qkv's dtype. The scores exist only as tiles: softmax is online.

    Notes
    -----
    Dao et al., "FlashAttention", 2022.
    """
    _, heads, _, head_size = k.shape
    if out is None:
        out = device_empty((len(qkv), heads * head_size), qkv.dtype)
    args = (qkv, k, v, starts, slots, past, out, scale)
    sizes = {"elem": qkv.dtype, "head_size": head_size}
    if qkv.dtype != np.float32 and head_size % 16 == 0 and has_mma():
        grid = (heads, -(-longest // _MMA_QUERIES), len(slots))
        shared = _mma_shared(head_size)
        launch(ATTENTION_PREFILL_MMA, grid, (_MMA_THREADS,), args, shared=shared, **sizes)
    else:
        grid = (-(-longest // _query_tile(head_size)), heads, len(slots))
        launch(ATTENTION_PREFILL, grid, (_PREFILL_THREADS,), args, **sizes)
    return out


@op(reference="reference.attention_decode", cost=_decode_cost)
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
    """Attention of one new token per row over its cache, which it extends.

    Parameters
    ----------
    qkv : array [B, 3C]
        Rows of [q | k | v].
    k, v : array [S, NH, T, HS]
        One layer of the cache; key and value are written at ``positions``.
    slots : array of int32 [B]
        Cache slot of each row; -1 marks an idle row, whose output is zero.
    positions : array of int32 [B]
        Tokens before the new one, that is, its position.
    scale : float
        Factor on the scores.
    out : array [B, C], optional
    batch_invariant : bool
        Share each head out among as many blocks whatever the number of rows: the bits
        of a row then do not depend on it. On the CPU they never do.

    Returns
    -------
    array [B, C]
        Of qkv's dtype.

    Notes
    -----
    Milakov, Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    _, heads, _, head_size = k.shape
    if out is None:
        out = device_empty((len(qkv), heads * head_size), qkv.dtype)
    halves = qkv.dtype != np.float32
    mma = halves and head_size % 16 == 0 and has_mma()
    blocks, shared = heads * len(qkv), 0
    if halves and blocks > _MANY_PER_SM * sm_count() and not batch_invariant:
        split, warps, kernel = 1, _MANY_WARPS, ATTENTION_DECODE_MANY
        if mma:
            warps = 4 if blocks <= _FULL_PER_SM * sm_count() else 2
            kernel, shared = ATTENTION_DECODE_ROWS[warps], _stream_shared(warps, head_size)
    else:
        split = _invariant_split() if batch_invariant else _split(blocks)
        warps, kernel = _DECODE_WARPS, (ATTENTION_DECODE_MMA if mma else ATTENTION_DECODE)[split]
    launch(
        kernel,
        (heads * split, len(qkv)),
        (32 * warps,),
        (qkv, k, v, slots, positions, out, scale),
        elem=qkv.dtype,
        head_size=head_size,
        shared=shared,
    )
    return out


def _split(heads: int) -> int:
    """Blocks for each of so many heads: as many as fill the chip without a second wave."""
    if not has_clusters():
        return 1
    room = sm_count() * 8 // 5
    return max(split for split in (1, 2, 4, 8) if split == 1 or heads * split <= room)


def _invariant_split() -> int:
    return _INVARIANT_SPLIT if has_clusters() else 1
