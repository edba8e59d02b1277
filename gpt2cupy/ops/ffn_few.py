"""The feed-forward network of few rows, whose hidden values stay in shared memory: ffn_few.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from .core.cuda_source import constants
from .core.device import has_clusters, has_mma, shared_limit, sm_count
from .core.launch import Kernel, launch
from .linear_kernels import entries

Array = Any
Sizes = tuple[int, int, int]  # C, F, M

_FEW = (
    "x: ELEM[N,C], w1: ELEM[F,C], b1: ELEM[F]?, w2: ELEM[M,F], partial: float32[P,N,M]!, "
    "activation: int, ahead: int, N, C, F, M"
)
# By the most rows and the blocks of a cluster.
FFN_FEW = {
    (rows, blocks): Kernel("ffn_few.cu", f"ffn_few_b{rows}_c{blocks}", _FEW, overlaps=True)
    for rows in (8, 16)
    for blocks in (1, 2)
}
FFN_SUM = entries(
    "ffn_few.cu",
    "ffn_sum",
    "partial: float32[P,N,M], bias: OUT[M]?, residual: OUT[N,M]?, out: OUT[N,M]~, P, N, M",
    overlaps=True,
)
_ITEM = 2  # bytes of fp16 and bf16
_STATIC = 256  # bytes of its shared memory beside stages, rows and sums, at most
_AHEAD = (12, 8, 4)  # loads of a lane in flight, as many as fit


def fits(rows: int, sizes: Sizes, dtype: Any) -> bool:
    """Whether ffn_few.cu is there for so many rows.

    Not for float32: its sums of split products miss the error rule.
    """
    if np.dtype(dtype) == np.float32:
        return False
    c = constants("ffn_few.cu")
    if not 0 < rows <= c["MOST_ROWS"] or any(n % 8 or not n for n in sizes):
        return False
    # Every warp has a part of a row of w1.
    wide = sizes[0] * _ITEM >= c["WARPS"] * 64
    return wide and has_mma() and _plan(rows, sizes)[1] <= shared_limit() - _STATIC


def _blocks() -> int:
    """Blocks of a cluster."""
    return 2 if has_clusters() else 1


def parts(hidden: int) -> int:
    """Into how many parts the hidden values are split: as many clusters as run at once."""
    return max(1, min(sm_count() // _blocks(), hidden // constants("ffn_few.cu")["TILE"]))


def _plan(rows: int, sizes: Sizes) -> tuple[int, int]:
    """Loads in flight, and bytes of a block: stages, rows of x and of hidden values, sums."""
    c, (inner, hidden, _) = constants("ffn_few.cu"), sizes
    longest = -(-hidden // c["TILE"] // parts(hidden)) * c["TILE"]
    pad = c["PAD_BYTES"]
    pitches = (-(-k * _ITEM // (2 * pad)) * 2 * pad + pad for k in (inner, longest))
    rest = rows * sum(pitches) + c["SUM_BYTES"]
    plans = [(ahead, ahead * c["RING_BYTES"] + rest) for ahead in _AHEAD]
    return next((each for each in plans if each[1] <= shared_limit() - _STATIC), plans[-1])


def launch_few(
    arrays: tuple[Any, ...],
    w2: Array,
    b2: Array | None,
    residual: Array | None,
    out: Array,
    partial: Array,
    activation: int,
) -> None:
    """The network; ``arrays`` are x, w1 and b1, ``partial`` has :func:`parts` partial sums."""
    c, w1 = constants("ffn_few.cu"), arrays[1]
    blocks = _blocks()
    ahead, shared = _plan(len(out), (*w1.shape[::-1], len(w2)))
    kernel = FFN_FEW[8 if len(out) <= 8 else 16, blocks]
    args = (*arrays, w2, partial, activation, ahead)
    launch(kernel, (len(partial) * blocks,), (c["THREADS"],), args, elem=w1.dtype, shared=shared)
    grid = (-(-out.size // (4 * c["WARP"])),)
    last = FFN_SUM[out.dtype == np.float32]
    launch(last, grid, (c["SUM_THREADS"],), (partial, b2, residual, out), elem=w1.dtype)
