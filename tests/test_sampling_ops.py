"""The choice of a token: processors, noise and the ring, on NumPy and on the GPU."""

from __future__ import annotations

import numpy as np
import pytest

from gpt2cupy import SamplingParams, ops
from gpt2cupy.ops import reference_sampling
from gpt2cupy.ops.sampling import PROMPT_BIT, RING_ENTRY

V, VP = 1003, 1024


def choose(xp, logits, params, positions, counts=None, bias=None, plain=False):
    """Run ops.sample once for every row; returns ids, positions and ring entries."""
    batch = len(logits)
    padded = np.full((batch, VP), np.nan, np.float32)
    padded[:, :V] = logits
    rows = np.concatenate([p.view(np.uint8).reshape(1, -1) for p in params])
    state = [xp.asarray(a) for a in (rows, np.zeros(batch, np.int32), positions.astype(np.int32))]
    steps, ring = xp.zeros(batch, np.uint32), xp.zeros((batch, 4, 16), np.uint8)
    counts = None if counts is None else xp.asarray(counts)
    bias = None if bias is None else xp.asarray(bias)
    order = xp.asarray(np.arange(batch, dtype=np.int32))
    extra = {"counts": counts, "bias": bias, "plain": plain}
    ops.sample(xp.asarray(padded), V, order, *state, steps, ring, **extra)
    get = (lambda a: a) if xp is np else (lambda a: a.get())
    entries = get(ring).view(RING_ENTRY)[:, 0, 0]
    return get(state[1]), get(state[2]), entries, None if counts is None else get(counts)


def test_greedy_takes_the_largest_and_the_smaller_id_of_equals(xp):
    logits = np.random.default_rng(0).standard_normal((3, V)).astype(np.float32)
    logits[1, [700, 40]] = 9.0
    greedy = SamplingParams().row(0, 4, -1)
    ids, positions, entries, _ = choose(xp, logits, [greedy] * 3, np.array([3, 4, 5]))
    assert ids.tolist() == [logits[0].argmax(), 40, logits[2].argmax()]
    assert positions.tolist() == [4, 5, 6]
    assert entries["stamp"].tolist() == [1, 1, 1]
    expected = reference_sampling.token_logprobs(logits.astype(np.float64))
    np.testing.assert_allclose(entries["logprob"], expected[range(3), ids], rtol=2e-6, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.7, 100.0])
def test_the_plain_kernel_chooses_what_the_full_one_chooses(temperature):
    import cupy

    rng = np.random.default_rng(2)
    logits = (rng.standard_normal((64, V)) * 3).astype(np.float32)
    logits[0] = np.nan
    params = SamplingParams(seed=5, temperature=temperature)
    rows, positions = [params.row(i, 0, 7) for i in range(64)], rng.integers(0, 1000, 64)
    full = choose(cupy, logits, rows, positions)
    plain = choose(cupy, logits, rows, positions, plain=True)
    np.testing.assert_array_equal(plain[0], full[0])
    np.testing.assert_array_equal(plain[1], full[1])
    np.testing.assert_array_equal(plain[2]["stamp"], full[2]["stamp"])
    np.testing.assert_allclose(plain[2]["logprob"][1:], full[2]["logprob"][1:], atol=2e-6)


CASES = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.8},
    "top_k_and_p": {"temperature": 0.9, "top_k": 50, "top_p": 0.9},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "penalties": {
        "temperature": 1.0,
        "repetition_penalty": 1.7,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
    },
    "greedy_penalties": {"repetition_penalty": 1.9},
    "min_new_tokens": {"temperature": 1.0, "min_new_tokens": 100},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_the_kernel_chooses_what_numpy_chooses(case):
    import cupy

    rng = np.random.default_rng(1)
    batch = 64
    logits = (rng.standard_normal((batch, V)) * 3).astype(np.float32)
    params = SamplingParams(seed=5, **CASES[case])
    rows = [params.row(i, 0, 7) for i in range(batch)]
    counted = params.counts_tokens
    counts = rng.integers(0, 3, (batch, V)).astype(np.int32) if counted else None
    if counted:
        counts[:, ::5] |= PROMPT_BIT
    bias = rng.standard_normal((batch, V)).astype(np.float32) if counted else None
    positions = rng.integers(0, 1000, batch)
    copy = None if counts is None else counts.copy()
    ours = choose(cupy, logits, rows, positions, copy, bias)
    theirs = choose(np, logits, rows, positions, counts, bias)
    # exp and log differ in the last bit between the two: allow one near-tie in 64 rows.
    assert np.count_nonzero(ours[0] != theirs[0]) <= 1
    same = ours[0] == theirs[0]
    np.testing.assert_allclose(
        ours[2]["logprob"][same], theirs[2]["logprob"][same], rtol=1e-5, atol=1e-5
    )
    if counted:
        np.testing.assert_array_equal(ours[3][same], theirs[3][same])


def test_philox_gives_the_published_vectors():
    # Known answers of Random123 for philox4x32-10.
    zeros = reference_sampling.philox(np.zeros((1, 4), np.uint32), 0)
    assert [hex(v) for v in zeros[0]] == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    ones = reference_sampling.philox(np.full((1, 4), 0xFFFFFFFF, np.uint32), 2**64 - 1)
    assert [hex(v) for v in ones[0]] == ["0x408f276d", "0x41c83b0e", "0xa20bc7c6", "0x6d5451fd"]


def test_samples_follow_the_softmax(xp):
    """Chi-square of 4096 draws over 8 tokens; the seed is fixed, so the test cannot flicker."""
    draws = 4096
    logits = np.full((draws, V), -np.inf, np.float32)
    logits[:, :8] = np.linspace(-1, 1, 8)
    row = SamplingParams(temperature=1.0, seed=11).row(0, 0, -1)
    ids, *_ = choose(xp, logits, [row] * draws, np.arange(draws))
    expected = np.exp(np.linspace(-1, 1, 8))
    expected *= draws / expected.sum()
    observed = np.bincount(ids, minlength=8)
    assert len(observed) == 8
    statistic = float(((observed - expected) ** 2 / expected).sum())
    assert statistic < 24.3  # 99.9 % quantile of chi-square with 7 degrees of freedom


def test_top_logprobs(xp):
    logits = np.random.default_rng(0).standard_normal((2, VP)).astype(np.float32)
    logits[0, [3, 9]] = 50.0
    ids, logprobs = ops.top_logprobs(xp.asarray(logits), V, 4)
    if xp is not np:
        ids, logprobs = ids.get(), logprobs.get()
    exact = reference_sampling.token_logprobs(logits[:, :V].astype(np.float64))
    order = np.argsort(-exact, axis=-1, kind="stable")[:, :4]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(logprobs, np.take_along_axis(exact, order, -1), atol=5e-6)


def test_target_logprobs(xp):
    logits = np.random.default_rng(0).standard_normal((3, VP)).astype(np.float32)
    targets = np.array([0, V - 1, -1], np.int32)
    ours = ops.target_logprobs(xp.asarray(logits), V, xp.asarray(targets))
    ours = ours if xp is np else ours.get()
    exact = reference_sampling.token_logprobs(logits[:, :V].astype(np.float64))
    np.testing.assert_allclose(ours, [exact[0, 0], exact[1, V - 1], 0], atol=5e-6)
