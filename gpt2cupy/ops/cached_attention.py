"""Attention over the cache, for prompts and for single tokens. Kernels: attention_*.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from .core.cuda_source import constants
from .core.device import has_clusters, has_mma, sm_count
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_INVARIANT_SPLIT = 2  # blocks of a head with batch_invariant: half-way between one row and many
_MANY_PER_SM = 2  # blocks of a multiprocessor; where there would be more, they are smaller
_FULL_PER_SM = 4  # where there would be even more, those of attention_decode_rows.cu have two warps

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
_BLOCKS = {1: "", 2: "_c2", 4: "_c4", 8: "_c8"}
ATTENTION_DECODE = {n: _decode_kernel("attention_decode.cu", e) for n, e in _BLOCKS.items()}
ATTENTION_DECODE_MMA = {n: _decode_kernel("attention_decode_mma.cu", e) for n, e in _BLOCKS.items()}
# One smaller block for each head of many rows; on tensor cores by its warps.
ATTENTION_DECODE_MANY = _decode_kernel("attention_decode.cu", "_many")
ATTENTION_DECODE_ROWS = {n: _decode_kernel("attention_decode_rows.cu", f"_w{n}") for n in (2, 4)}


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


@op(
    reference="reference.attention_prefill",
    takes="qkv: real[N,C3], k: real[S,NH,T,HS], v: real[S,NH,T,HS], starts: int32[R1], "
    "slots: int32[R], past: int32[R], longest: int, scale: number, out: real[N,C]!, "
    "batch_invariant: bool",
    of_models=True,
)
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
        c = constants("attention_prefill_mma.cu", HS=head_size)
        grid, block = (heads, -(-longest // c["BR"]), len(slots)), (c["GROUPS"] * c["THREADS"],)
        launch(ATTENTION_PREFILL_MMA, grid, block, args, shared=c["SHARED_BYTES"], **sizes)
    else:
        c = constants("attention_prefill.cu", HS=head_size)
        grid, block = (-(-longest // c["BR"]), heads, len(slots)), (c["SIDE"] * c["SIDE"],)
        launch(ATTENTION_PREFILL, grid, block, args, **sizes)
    return out


@op(
    reference="reference.attention_decode",
    cost=_decode_cost,
    takes="qkv: real[B,C3], k: real[S,NH,T,HS], v: real[S,NH,T,HS], slots: int32[B], "
    "positions: int32[B], scale: number, out: real[B,C]!, batch_invariant: bool",
    of_models=True,
)
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
    wide = qkv.dtype == np.float32
    mma = not wide and head_size % 16 == 0 and has_mma()
    blocks, shared = heads * len(qkv), 0
    if not wide and blocks > _MANY_PER_SM * sm_count() and not batch_invariant:
        split, kernel = 1, ATTENTION_DECODE_MANY
        if mma:
            warps = 4 if blocks <= _FULL_PER_SM * sm_count() else 2
            kernel = ATTENTION_DECODE_ROWS[warps]
            shared = warps * constants(kernel.source, HS=head_size)["WARP_BYTES"]
        else:
            warps = constants(kernel.source)["MANY_WARPS"]
    else:
        split = _invariant_split() if batch_invariant else _split(blocks)
        kernel = (ATTENTION_DECODE_MMA if mma else ATTENTION_DECODE)[split]
        warps = constants(kernel.source)["WARPS"]
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
