"""A whole decode step up to the logits in one launch. Kernel: cuda_src/decode_step.cu."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..core.cuda_source import constants
from ..core.device import has_clusters, shared_limit, sm_count
from ..core.launch import Kernel, launch
from ..core.registry import Cost, moved, op
from ..core.variants import STEP_ROWS
from ..epilogue import ACTIVATION_CODES

Array = Any

ROWS = STEP_ROWS  # of the entries

_SIGNATURE = (
    "ids: int32[N], positions: int32[N], slots: int32[N], wte: ELEM[Vp,K], wpe: ELEM[P,K], "
    "ln1_w: ELEM[L,K], ln1_b: ELEM[L,K], qkv_w: ELEM[L,Q,K], qkv_b: ELEM[L,Q], "
    "proj_w: ELEM[L,K,K], proj_b: float32[L,K], ln2_w: ELEM[L,K], ln2_b: ELEM[L,K], "
    "fc_w: ELEM[L,F,K], fc_b: ELEM[L,F], out_w: ELEM[L,K,F], out_b: float32[L,K], "
    "lnf_w: ELEM[K], lnf_b: ELEM[K], lm_head: ELEM[Vp,K], "
    "k: ELEM[L,S,NH,T,HS], v: ELEM[L,S,NH,T,HS], mailboxes: uint8[W], logits: float32[N,Vp], "
    "scale: float, by_layer: int, eps: float, activation: int, together: int, L, S, T, P, Vp"
)
DECODE_STEP = {
    rows: Kernel(
        "decode_step.cu",
        f"decode_step_b{rows}",
        _SIGNATURE,
        cooperative=True,
        macros={"BATCH": str(rows)},
    )
    for rows in ROWS
}
WEIGHTS = (
    "wte", "wpe", "ln1_w", "ln1_b", "qkv_w", "qkv_b", "proj_w", "proj_b", "ln2_w", "ln2_b",
    "fc_w", "fc_b", "out_w", "out_b", "lnf_w", "lnf_b", "lm_head",
)  # fmt: skip


def _constants() -> Mapping[str, int]:
    return constants("decode_step.cu")


def why_not(rows: int, channels: int, inner: int, head_size: int, dtype: Any) -> str | None:
    """Why the current device has no such step for a model's sizes; None if it has."""
    if rows not in ROWS:
        return f"it takes {', '.join(map(str, ROWS))} rows, not {rows}"
    c = _constants()
    if head_size != c["STEP_HEAD_SIZE"] or inner != c["WIDE"] * channels:
        return (
            f"it takes heads of {c['STEP_HEAD_SIZE']} and an inner size of {c['WIDE']} n_embd, "
            f"not {head_size} and {inner / channels:g}"
        )
    shortest, longest = c["STEP_FEWEST_CHANNELS"], c["STEP_MOST_CHANNELS"]
    if not shortest <= channels <= longest:
        return f"it takes n_embd from {shortest} to {longest}, not {channels}"
    if np.dtype(dtype).itemsize != 2:
        return f"it takes float16 and bfloat16, not {np.dtype(dtype).name}"
    if not has_clusters():
        return "it needs compute capability 9.0"
    if shared_limit() < c["SHARED"]:
        return f"it needs {c['SHARED'] >> 10} KiB of shared memory a block"
    if channels > c["GROUP"] * blocks(channels):
        return f"it needs {-(-channels // c['GROUP'])} multiprocessors for n_embd {channels}"
    return None


def blocks(channels: int) -> int:
    """Blocks of the launch: each multiprocessor has one, and each an output of every GEMV."""
    return min(sm_count(), channels)


def mailboxes_size(rows: int, channels: int) -> int:
    """Bytes of the mailboxes of all blocks; zeroed before the first step, and kept."""
    c = _constants()
    head_size = c["STEP_HEAD_SIZE"]
    floats = 2 * channels + channels // head_size * c["MOST_PARTS"] * (head_size + 4)
    elements = 3 * channels + channels + c["WIDE"] * channels
    return 16 + rows * (8 * floats + 4 * elements)


def _cost(
    ids: Array,
    positions: Array,
    slots: Array,
    weights: Mapping[str, Array],
    k: Array,
    out: Array,
    context: float,
) -> Cost:
    """Every weight once but the embeddings, of which a row each; keys and values as attention.

    What blocks tell each other is no input and no output.
    """
    rows, layers, channels = len(ids), len(k), weights["wpe"].shape[1]
    layered = [each for name, each in weights.items() if name not in ("wte", "wpe", "lm_head")]
    embedded = 2 * rows * channels * k.dtype.itemsize
    cache = embedded * layers * (context + 1)
    products = sum(each.size for each in layered if each.ndim == 3) + weights["lm_head"].size
    flops = 2 * rows * products + 4 * layers * rows * channels * (context + 1)
    read = moved(ids, positions, slots, weights["lm_head"], *layered)
    return Cost(read + embedded + cache + out.nbytes, flops)


@op(reference=None, cost=_cost)
def decode_step(
    ids: Array,
    positions: Array,
    slots: Array,
    weights: Mapping[str, Array],
    k: Array,
    v: Array,
    mailboxes: Array,
    *,
    scale: float,
    by_layer: bool,
    eps: float,
    activation: str,
    out: Array,
    together: bool = False,
) -> None:
    """Feed one token per row and write the logits of the next.

    Parameters
    ----------
    ids, positions, slots : array of int32 [N]
        A row with slot -1 is idle.
    weights : mapping of arrays
        :data:`WEIGHTS` by name.
    k, v : array [L, S, NH, T, HS]
        Read up to the position, which is written.
    mailboxes : array of uint8 [:func:`mailboxes_size`]
        Of steps of this many rows alone.
    scale : float
        Of attention in layer 0; divided by the layer's number where ``by_layer``.
    eps : float
    activation : str
        As :func:`gpt2cupy.ops.linear` takes it.
    out : array of float32 [N, Vp]
    together : bool
        Whether all rows belong to one text, at neighbouring positions in their order: each then
        sees the tokens of the rows before its own.
    """
    c, channels = _constants(), weights["wpe"].shape[-1]
    arrays = [weights[name] for name in WEIGHTS]
    options = (scale, by_layer, eps, ACTIVATION_CODES[activation], together)
    launch(
        DECODE_STEP[len(ids)],
        (blocks(channels),),
        (c["THREADS"],),
        (ids, positions, slots, *arrays, k, v, mailboxes, out, *options),
        elem=k.dtype,
        head_size=c["STEP_HEAD_SIZE"],
        inner=channels,
        shared=c["SHARED"],
    )
