"""Choosing the next token on the device. Kernels: cuda_src/sampling.cu, sample_plain.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from .core.cuda_source import constants
from .core.device import has_clusters, sm_count
from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, op
from .reference_sampling import PROMPT_BIT, RING_ENTRY, ROW_PARAMS

Array = Any

__all__ = [
    "PROMPT_BIT",
    "RING_ENTRY",
    "ROW_PARAMS",
    "sample",
    "sample_logits",
    "target_logprobs",
    "top_logprobs",
]

SAMPLE = Kernel(
    "sampling.cu",
    "sample",
    "logits: float32[R,Vp], rows: int32[R], params: uint8[B,48], ids: int32[B], "
    "positions: int32[B], steps: uint32[B], ring: uint8[B,Q,16], counts: int32[B,V]?, "
    "bias: float32[B,V]?, scratch: float32[R,Vp], V: int, Vp, Q",
)
# By the number of blocks that share a row.
SAMPLE_PLAIN = {
    parts: Kernel(
        "sample_plain.cu",
        "sample_plain" + ending,
        "logits: float32[R,Vp], rows: int32[R], params: uint8[B,48], ids: int32[B], "
        "positions: int32[B], steps: uint32[B], ring: uint8[B,Q,16], V: int, Vp, Q",
        overlaps=True,
    )
    for parts, ending in ((1, ""), (2, "_c2"), (4, "_c4"), (8, "_c8"))
}
SAMPLE_LOGITS = Kernel(
    "sample_logits.cu",
    "sample_logits",
    "logits: ELEM[*B,V], positions: int32[B]?, scratch: float32[B,V]!, ids: int32[B]!, "
    "temperature: float, top_k: int, top_p: float, min_p: float, seed: int64, V, logits_stride",
)
TOP_LOGPROBS = Kernel(
    "sampling.cu",
    "top_logprobs",
    "logits: float32[N,Vp], ids: int32[N,K], logprobs: float32[N,K], V: int, Vp, K",
)
TARGET_LOGPROBS = Kernel(
    "sampling.cu",
    "target_logprobs",
    "logits: float32[N,Vp], targets: int32[N], logprobs: float32[N], V: int, Vp",
)


def _cost(
    logits: Array,
    vocab_size: int,
    rows: Array,
    params: Array,
    ids: Array,
    positions: Array,
    steps: Array,
    ring: Array,
    counts: Array | None,
    bias: Array | None,
) -> Cost:
    """One pass over V logits (counts, bias) per row; maximum, exponential and sum: 3 per logit."""
    n, read = len(logits), [each for each in (logits, counts, bias) if each is not None]
    per_row = params.shape[1] + ring.shape[2] + 2 * (ids.itemsize + positions.itemsize)
    per_row += rows.itemsize + 2 * steps.itemsize
    per_row += vocab_size * sum(each.itemsize for each in read)
    return Cost(n * per_row, 3 * n * vocab_size)


@op(
    reference="reference.sample",
    cost=_cost,
    takes="logits: float32[R,Vp], vocab_size: int, rows: int32[R], params: uint8[B,48], "
    "ids: int32[B], positions: int32[B], steps: uint32[B], ring: uint8[B,Q,16], "
    "counts: int32[B,V]?, bias: float32[B,V]?, scratch: float32[R,Vp]?, plain: bool",
    of_models=True,
)
def sample(
    logits: Array,
    vocab_size: int,
    rows: Array,
    params: Array,
    ids: Array,
    positions: Array,
    steps: Array,
    ring: Array,
    *,
    counts: Array | None = None,
    bias: Array | None = None,
    scratch: Array | None = None,
    plain: bool = False,
) -> None:
    """Choose one token per line of logits and advance the state of its row in place.

    Processors apply in transformers' order: bias, repetition, presence and
    frequency penalties, minimum length, temperature, top-k, top-p, min-p. The
    result is the arg-max, of the logits with Gumbel noise where the temperature
    is positive; the noise is Philox of (seed, position, token id).

    Parameters
    ----------
    logits : array of float32 [R, Vp]
    vocab_size : int
        V, without the padding.
    rows : array of int32 [R]
        The state row of each line.
    params : array of uint8 [B, 48]
        ``ROW_PARAMS`` of every row.
    ids, positions : array of int32 [B]
        In: token fed last and its position. Out: the token sampled and its.
    steps : array of uint32 [B]
        Tokens sampled so far in each row; advanced.
    ring : array of uint8 [B, Q, 16]
        ``RING_ENTRY`` of the last Q tokens of each row: id, log-probability
        under the raw logits, and the step count as a stamp of either half. The
        log-probability is NaN where, and only where, the raw logits are not finite: one
        is NaN or positive infinity, or none is a number above negative infinity.
    counts : array of int32 [B, V], optional
        How often each token was generated, plus ``PROMPT_BIT``; advanced.
    bias : array of float32 [B, V], optional
        Added to the logits.
    scratch : array of float32 [R, Vp], optional
        Working memory of the GPU; NumPy needs none.
    plain : bool
        The caller's word that no row asks for more than a temperature (no counts,
        bias, top-k, top-p, min-p or minimum length): a faster kernel for that.
    """
    state = (rows, params, ids, positions, steps, ring)
    if plain:
        parts = _parts(len(logits))
        grid = (len(logits) * parts,)
        launch(SAMPLE_PLAIN[parts], grid, _block(SAMPLE_PLAIN[parts]), (logits, *state, vocab_size))
        return
    if scratch is None:
        scratch = device_empty(logits.shape, logits.dtype)
    launch(
        SAMPLE, (len(logits),), _block(SAMPLE), (logits, *state, counts, bias, scratch, vocab_size)
    )


def _block(kernel: Kernel) -> tuple[int]:
    return (constants(kernel.source)["THREADS"],)


def _parts(rows: int) -> int:
    """Blocks for each row: as many as have a multiprocessor each."""
    if not has_clusters():
        return 1
    return max(parts for parts in SAMPLE_PLAIN if parts == 1 or rows * parts <= sm_count())


def _check(
    logits: Array,
    positions: Array | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    out: Array | None = None,
    scratch: Array | None = None,
) -> None:
    wrong = [
        name
        for name, fine in (
            ("logits", logits.shape[1] > 0 or not len(logits)),
            ("temperature", 0 <= temperature < float("inf")),
            ("top_k", top_k >= 0),
            ("top_p", 0 < top_p <= 1),
            ("min_p", 0 <= min_p <= 1),
            ("seed", 0 <= seed < 1 << 64),
        )
        if not fine
    ]
    if wrong:
        raise InputError(
            f"{wrong[0]} is outside its range",
            where=f"sample_logits: {wrong[0]}",
            remedy="Give logits as [B, V], temperature and top_k from 0, top_p above 0 up to 1, "
            "min_p from 0 to 1, and a seed of 64 bits.",
        )


def _logits_cost(logits: Array) -> Cost:
    """The logits once, and an id per row; scale, maximum, exponential and sum: 4 per logit."""
    return Cost(logits.nbytes + 4 * len(logits), 4 * logits.size)


@op(
    reference="reference.sample_logits",
    cost=_logits_cost,
    takes="logits: real[B,V], positions: int32[B]?, temperature: number, top_k: int, "
    "top_p: number, min_p: number, seed: int, out: int32[B]!, scratch: float32[B,V]?",
    check=_check,
    only_launches=True,
)
def sample_logits(
    logits: Array,
    positions: Array | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    out: Array | None = None,
    scratch: Array | None = None,
) -> Array:
    """A token of each row of logits: ``argmax(logits / temperature + noise)`` of those kept.

    That is a draw from ``softmax(logits / temperature)`` where the noise is Gumbel's. It is
    Philox of (seed, position, token), the same on CPU and GPU.

    Parameters
    ----------
    logits : array [B, V]
    positions : array of int32 [B], optional
        What parts the noise of one row and step from that of another; by default the row's number.
    temperature : float
        0 takes the largest logit.
    top_k : int
        Keep the tokens whose logit is at least the k-th largest; 0 keeps all.
    top_p : float
        Keep the most probable tokens, until those before have this much of what top-k left.
    min_p : float
        Keep the tokens that have at least this share of the largest probability.
    seed : int
        64 bits.
    out : array of int32 [B], optional
    scratch : array of float32 [B, V], optional
        Working memory of the GPU; NumPy needs none.

    Returns
    -------
    array of int32 [B]

    Raises
    ------
    InputError
        For settings outside their range, dtypes or shapes that do not fit, or logits without a
        column; on the GPU also for a layout, alignment or device that the kernel does not take.

    Notes
    -----
    Gumbel-max: Maddison, Tarlow, Minka, "A* Sampling", 2014.
    """
    if out is None:
        out = device_empty((len(logits),), np.int32)
    if scratch is None:
        scratch = device_empty(logits.shape, np.float32)
    seed -= (seed >> 63) << 64  # the same bits as a signed number
    settings = (temperature, top_k, top_p, min_p, seed)
    args = (logits, positions, scratch, out, *settings)
    launch(SAMPLE_LOGITS, (len(logits),), _block(SAMPLE_LOGITS), args, elem=logits.dtype)
    return out


@op(
    reference="reference.top_logprobs",
    takes="logits: float32|float64[N,Vp], vocab_size: int, count: int",
    of_models=True,
)
def top_logprobs(logits: Array, vocab_size: int, count: int) -> tuple[Array, Array]:
    """The ``count`` most probable tokens of each row, best first, and their log-probabilities.

    Parameters
    ----------
    logits : array of float32 [N, Vp]
    vocab_size, count : int

    Returns
    -------
    ids : array of int32 [N, count]
    logprobs : array of float32 [N, count]
    """
    shape = (len(logits), count)
    ids, logprobs = device_empty(shape, np.int32), device_empty(shape, np.float32)
    launch(TOP_LOGPROBS, (len(logits),), _block(TOP_LOGPROBS), (logits, ids, logprobs, vocab_size))
    return ids, logprobs


@op(
    reference="reference.target_logprobs",
    takes="logits: float32|float64[N,Vp], vocab_size: int, targets: int32[N]",
    of_models=True,
)
def target_logprobs(logits: Array, vocab_size: int, targets: Array) -> Array:
    """Log-probability of one given token per row; 0 where the target is no token.

    It is NaN where, and only where, the row's logits are not finite, as in :func:`sample`.

    Parameters
    ----------
    logits : array of float32 [N, Vp]
    vocab_size : int
    targets : array of int32 [N]

    Returns
    -------
    array of float32 [N]
    """
    logprobs = device_empty((len(logits),), np.float32)
    launch(
        TARGET_LOGPROBS,
        (len(logits),),
        _block(TARGET_LOGPROBS),
        (logits, targets, logprobs, vocab_size),
    )
    return logprobs
