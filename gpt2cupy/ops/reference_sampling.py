"""Choosing the next token in plain NumPy: the specification of the kernels that do it.

Those are in ``cuda_src/sampling.cu`` and ``sample_plain.cu``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

# One row's settings as they lie in device memory; `struct RowParams` in sampling.cuh.
ROW_PARAMS = np.dtype(
    [
        ("seed", np.uint64),
        ("temperature", np.float32),  # 0: greedy
        ("top_k", np.int32),  # 0: off
        ("top_p", np.float32),  # 1: off
        ("min_p", np.float32),  # 0: off
        ("repetition", np.float32),  # 1: off
        ("presence", np.float32),
        ("frequency", np.float32),
        ("eos", np.int32),  # -1: none
        ("min_position", np.int32),  # eos cannot be sampled at a position below this
        ("unused", np.int32),
    ]
)

# One entry of the token ring, through which tokens reach the host; `struct RingEntry`.
RING_ENTRY = np.dtype(
    [("stamp", np.uint32), ("id", np.int32), ("stamp_again", np.uint32), ("logprob", np.float32)]
)

SHORTEST, LONGEST = 2, 8  # tokens by which a text must have ended alike; `propose_drafts.cu`

PROMPT_BIT = np.int32(1 << 30)  # in `counts`: the token stands in the prompt


def philox(counter: Array, key: int) -> Array:
    """Philox4x32-10 (Salmon et al., 2011).

    Parameters
    ----------
    counter : array of uint32 [..., 4]
    key : int
        64 bits.

    Returns
    -------
    array of uint32 [..., 4]
    """
    c = [counter[..., i].astype(np.uint64) for i in range(4)]
    key0, key1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    low = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    for _ in range(10):
        first, second = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            second >> half ^ c[1] ^ np.uint64(key0),
            second & low,
            first >> half ^ c[3] ^ np.uint64(key1),
            first & low,
        ]
        key0, key1 = key0 + 0x9E3779B9 & 0xFFFFFFFF, key1 + 0xBB67AE85 & 0xFFFFFFFF
    return np.stack(c, axis=-1).astype(np.uint32)


def gumbel(seed: int, position: int, vocab_size: int) -> Array:
    """Standard Gumbel noise for every token id; depends on (seed, position, id) alone."""
    blocks = -(-vocab_size // 4)
    counter = np.zeros((blocks, 4), np.uint32)
    counter[:, 0] = np.arange(blocks, dtype=np.uint32)
    counter[:, 1] = position
    bits = philox(counter, seed).reshape(-1)[:vocab_size]
    # u near 0 keeps float32's full resolution, and it is small u that makes large noise.
    u = (bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
    u = np.minimum(u, np.float32(1 - 2.0**-24))
    return -np.log(-np.log1p(-u))


def process_logits(
    logits: Array, params: Any, position: int, counts: Array | None, bias: Array | None
) -> Array:
    """Logits of one row after every processor, removed tokens at -inf, in transformers' order."""
    x = logits.astype(np.float32)
    if bias is not None:
        x = x + bias
    if counts is not None:
        generated = (counts & ~PROMPT_BIT).astype(np.float32)
        penalised = np.where(x < 0, x * params["repetition"], x / params["repetition"])
        x = np.where(counts != 0, penalised, x)
        x = x - params["frequency"] * generated - params["presence"] * (generated > 0)
    if params["eos"] >= 0 and position < params["min_position"]:
        x[params["eos"]] = -np.inf
    if params["temperature"] <= 0:
        return x
    x = x / params["temperature"]
    if 0 < params["top_k"] < len(x):
        kth = np.partition(x, -params["top_k"])[-params["top_k"]]
        x = np.where(x < kth, -np.inf, x)
    top = x.max()
    if params["top_p"] < 1:
        order = np.sort(x)[::-1]
        mass = np.exp(order - top, dtype=np.float64)
        above = np.cumsum(mass) - mass  # what stands strictly before each token
        kept = int(np.count_nonzero(above < params["top_p"] * mass.sum()))
        x = np.where(x < order[max(kept, 1) - 1], -np.inf, x)
    if params["min_p"] > 0:
        x = np.where(x < top + np.log(params["min_p"]), -np.inf, x)
    return x


def best(x: Array) -> int:
    """The place of the largest value, the first of equals; NaN loses to every number."""
    if not np.isnan(x[place := int(np.argmax(x))]):
        return place  # a NaN would have been found first
    numbers = np.flatnonzero(~np.isnan(x))
    return int(numbers[np.argmax(x[numbers])]) if len(numbers) else len(x) - 1


def token_logprobs(logits: Array) -> Array:
    """log softmax over the last axis.

    All of a row is NaN if one of its logits is NaN or positive infinity, or none is finite:
    then so is the difference of the largest from itself.
    """
    with np.errstate(invalid="ignore"):
        top = logits.max(axis=-1, keepdims=True)
        return logits - (top + np.log(np.exp(logits - top).sum(axis=-1, keepdims=True)))


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
    settings = params.view(ROW_PARAMS)[:, 0]
    entries = ring.view(RING_ENTRY)[..., 0]
    for index, row in enumerate(rows):
        raw = logits[index, :vocab_size]
        own = settings[row]
        position = int(positions[row]) + 1
        x = process_logits(
            raw,
            own,
            position,
            None if counts is None else counts[row],
            None if bias is None else bias[row],
        )
        if own["temperature"] > 0:
            x = x + gumbel(int(own["seed"]), position, vocab_size)
        token = best(x)
        ids[row] = token
        positions[row] = position
        if counts is not None:
            counts[row, token] += 1
        entry = entries[row, int(steps[row]) % entries.shape[1]]
        entry["id"] = token
        entry["logprob"] = token_logprobs(raw)[token]  # NaN if the logits are not finite
        entry["stamp"] = entry["stamp_again"] = steps[row] + np.uint32(1)
        steps[row] += np.uint32(1)


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
    settings = np.zeros((), ROW_PARAMS)
    settings["temperature"], settings["top_k"] = temperature, top_k
    settings["top_p"], settings["min_p"], settings["eos"] = top_p, min_p, -1
    ids = np.empty(len(logits), np.int32)
    for row, raw in enumerate(logits):
        position = row if positions is None else int(positions[row])
        x = process_logits(raw, settings, position, None, None)
        if temperature > 0:
            x = x + gumbel(seed, position, len(x))
        ids[row] = best(x)
    if out is None:
        return ids
    out[...] = ids
    return out


def top_logprobs(logits: Array, vocab_size: int, count: int) -> tuple[Array, Array]:
    logprobs = token_logprobs(logits[:, :vocab_size])
    order = np.argsort(-logprobs, axis=-1, kind="stable")[:, :count]
    return order.astype(np.int32), np.take_along_axis(logprobs, order, axis=-1)


def target_logprobs(logits: Array, vocab_size: int, targets: Array) -> Array:
    logprobs = token_logprobs(logits[:, :vocab_size])
    inside = (targets >= 0) & (targets < vocab_size)
    chosen = np.take_along_axis(logprobs, np.where(inside, targets, 0)[:, None], axis=-1)[:, 0]
    return np.where(inside, chosen, 0)


def continuation(history: Array, last: int, count: int) -> list[int]:
    """What followed the last place where ``history[: last + 1]`` ended alike; -1 if nowhere did.

    Of places that agree by SHORTEST to LONGEST tokens the one that agrees by most, of equals
    the latest.
    """
    best, end = SHORTEST - 1, -1
    for place in np.flatnonzero(history[:last] == history[last])[::-1].tolist():
        length = 1
        while (
            length < min(LONGEST, place + 1) and history[place - length] == history[last - length]
        ):
            length += 1
        if length > best:
            best, end = length, place
        if best == LONGEST:
            break
    if end < 0:
        return [-1] * count
    # Past the newest token the text goes on as it did before.
    period = last - end
    return [int(history[end + 1 + step % period]) for step in range(count)]


def propose_drafts(ids: Array, positions: Array, history: Array) -> None:
    last, drafts = int(positions[0]), len(ids) - 1
    inside = 0 <= last < len(history)
    if inside:
        history[last] = ids[0]
    ids[1:] = continuation(history, last, drafts) if inside else [-1] * drafts


def accept_drafts(
    ids: Array,
    positions: Array,
    sampled_positions: Array,
    chosen: Array,
    history: Array,
    steps: Array,
    ring: Array,
) -> None:
    sampled, entries = chosen.view(RING_ENTRY)[:, 0, 0], ring.view(RING_ENTRY)[..., 0]
    first, count = int(positions[0]), 1
    while count < len(sampled) and ids[count] == sampled["id"][count - 1]:
        count += 1
    last = first + count
    if 0 <= first < len(history):
        history[first] = ids[0]
    if first >= 0 and last < len(history):
        history[first + 1 : last + 1] = sampled["id"][:count]
    for row in range(len(sampled)):
        entry = entries[row, int(steps[row]) % entries.shape[1]]
        entry["id"] = sampled["id"][row] if row < count else -1
        entry["logprob"] = sampled["logprob"][row]
        entry["stamp"] = entry["stamp_again"] = steps[row] + np.uint32(1)
        steps[row] += np.uint32(1)
    ids[0] = sampled["id"][count - 1]
    positions[...] = last + np.arange(len(positions))
    sampled_positions[...] = positions
