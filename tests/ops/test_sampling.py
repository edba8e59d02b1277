"""The choice of a token: processors, noise and the ring, on NumPy and on the GPU."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2cupy import SamplingParams, ops
from gpt2cupy.ops import reference_sampling, sampling
from gpt2cupy.ops.core.device import has_clusters
from gpt2cupy.ops.sampling import PROMPT_BIT, RING_ENTRY

V, VP = 1003, 1024


def choose(xp, logits, params, positions, counts=None, bias=None, plain=False):
    """Run ops.sample once for every row; returns ids, positions and ring entries."""
    batch, vocabulary = logits.shape
    padded = np.full((batch, -(-vocabulary // 128) * 128), np.nan, np.float32)
    padded[:, :vocabulary] = logits
    rows = np.concatenate([p.view(np.uint8).reshape(1, -1) for p in params])
    state = [xp.asarray(a) for a in (rows, np.zeros(batch, np.int32), positions.astype(np.int32))]
    steps, ring = xp.zeros(batch, np.uint32), xp.zeros((batch, 4, 16), np.uint8)
    counts = None if counts is None else xp.asarray(counts)
    bias = None if bias is None else xp.asarray(bias)
    order = xp.asarray(np.arange(batch, dtype=np.int32))
    extra = {"counts": counts, "bias": bias, "plain": plain}
    ops.sample(xp.asarray(padded), vocabulary, order, *state, steps, ring, **extra)
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


SHAPES = {
    "normal": lambda rng, shape: rng.standard_normal(shape) * 3,
    "flat": lambda rng, shape: np.zeros(shape),  # the noise alone decides
    "peaked": lambda rng, shape: np.where(rng.random(shape) < 2 / V, 20.0, 0.0),  # it hardly does
    "steps": lambda rng, shape: rng.integers(-2, 3, shape) * 1.5,  # many equals
    "far": lambda rng, shape: 1e4 + rng.standard_normal(shape),  # rounding shows
}


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperature", [0.0, 0.01, 0.7, 100.0])
def test_the_plain_kernel_chooses_what_the_full_one_chooses(temperature, shape):
    import cupy

    batch, rng = 64, np.random.default_rng(2)
    logits = SHAPES[shape](rng, (batch, V)).astype(np.float32)
    logits[0] = np.nan
    params = SamplingParams(seed=5, temperature=temperature)
    rows, positions = [params.row(i, 0, 7) for i in range(batch)], rng.integers(0, 1000, batch)
    full = choose(cupy, logits, rows, positions)
    plain = choose(cupy, logits, rows, positions, plain=True)
    np.testing.assert_array_equal(plain[0], full[0])
    np.testing.assert_array_equal(plain[1], full[1])
    np.testing.assert_array_equal(plain[2]["stamp"], full[2]["stamp"])
    # It is the difference of two numbers as large as the logits: of large ones, one unit.
    atol = max(2e-6, np.spacing(np.nanmax(np.abs(logits))))
    np.testing.assert_allclose(plain[2]["logprob"], full[2]["logprob"], atol=atol)


def rows_that_are_not_all_numbers(count: int = V) -> np.ndarray:
    """Logits [12, count]: NaN or infinite everywhere, here and there, first, last, but in one."""
    logits = np.random.default_rng(4).standard_normal((12, count)).astype(np.float32) * 3
    logits[0] = np.nan
    logits[1, count // 2] = np.nan
    logits[2, 0] = logits[3, count - 1] = np.nan
    logits[4, : count - 1] = np.nan
    logits[5] = -np.inf
    logits[6, : count - 7] = -np.inf  # whole warps, blocks and turns see nothing else
    logits[7, 3:] = -np.inf
    logits[8] = -np.inf
    logits[8, [4, 5, count - 4]] = np.nan  # NaN beside nothing larger than -inf
    logits[9, ::2] = -np.inf
    logits[10, count // 13] = np.inf
    logits[11, : count // 2] = np.nan
    return logits


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_nan_loses_to_every_number_and_shows_in_the_logprob(xp, temperature, plain):
    logits = rows_that_are_not_all_numbers()
    params = SamplingParams(seed=5, temperature=temperature)
    rows = [params.row(i, 0, 7) for i in range(len(logits))]
    with np.errstate(invalid="ignore"):  # inf - inf
        ids, _, entries, _ = choose(xp, logits, rows, np.arange(len(logits)), plain=plain)
        expected = reference_sampling.token_logprobs(logits.astype(np.float64))
    assert ids[[0, 4]].tolist() == [V - 1, V - 1]
    assert np.isnan(logits[range(12), ids]).tolist() == [True] + [False] * 11
    if temperature == 0:
        assert ids[[5, 8, 10]].tolist() == [0, 0, 77]
    lost = np.isnan(entries["logprob"])
    assert lost.tolist() == [i not in (6, 7, 9) for i in range(12)]
    np.testing.assert_allclose(entries["logprob"], expected[range(12), ids], atol=4e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_kernels_choose_what_numpy_chooses_beside_nan(temperature):
    import cupy

    logits = rows_that_are_not_all_numbers()
    params = SamplingParams(seed=5, temperature=temperature)
    rows, positions = [params.row(i, 0, 7) for i in range(12)], np.arange(12)
    with np.errstate(invalid="ignore"):
        expected = choose(np, logits, rows, positions)
    for plain in (False, True):
        found = choose(cupy, logits, rows, positions, plain=plain)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[2]["logprob"], expected[2]["logprob"], atol=4e-6)


@pytest.mark.parametrize("sms", [1, 40, 132])
def test_blocks_of_the_plain_kernel_have_a_multiprocessor_each(monkeypatch, sms):
    monkeypatch.setattr(sampling, "sm_count", lambda: sms)
    monkeypatch.setattr(sampling, "has_clusters", lambda: True)
    for rows in range(1, 600):
        parts = sampling._parts(rows)
        assert parts == 1 or rows * parts <= sms
        assert parts == 8 or rows * parts * 2 > sms  # no more would have
    monkeypatch.setattr(sampling, "has_clusters", lambda: False)
    assert sampling._parts(1) == 1


@pytest.fixture
def of_parts(monkeypatch, parts):
    """So many blocks share a row of the plain kernel."""
    if parts > 1 and not has_clusters():
        pytest.skip("blocks share a row on sm_90 and newer")
    monkeypatch.setattr(sampling, "_parts", lambda rows: parts)


# One turn of the first block; three by one block, one by eight; seven by one, one by eight.
@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [V, 20000, 50257])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_any_number_of_blocks_chooses_the_same_beside_nan(temperature, parts, vocabulary, of_parts):
    import cupy

    logits = rows_that_are_not_all_numbers(vocabulary)
    row = SamplingParams(seed=5, temperature=temperature).row(0, 0, 7)
    rows, positions = [row] * len(logits), np.arange(len(logits))
    full = choose(cupy, logits, rows, positions)
    plain = choose(cupy, logits, rows, positions, plain=True)
    np.testing.assert_array_equal(plain[0], full[0])
    np.testing.assert_allclose(plain[2]["logprob"], full[2]["logprob"], atol=4e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("vocabulary", [V, 20000, 50257])
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_logits_that_are_not_finite_are_marked(parts, vocabulary, of_parts):
    """The mark that the engine reads: a log-probability of NaN there, and nowhere else."""
    import cupy

    logits = rows_that_are_not_all_numbers(vocabulary)
    row = SamplingParams(seed=5, temperature=0.7).row(0, 0, 7)
    with np.errstate(invalid="ignore"):
        finite = np.isfinite(logits.max(axis=-1))
    for plain in (False, True):
        rows, positions = [row] * len(logits), np.arange(len(logits))
        found = choose(cupy, logits, rows, positions, plain=plain)
        assert np.isnan(found[2]["logprob"]).tolist() == (~finite).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("vocabulary", [50257, 70000])  # one turn of a thread, two, or many
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_plain_kernel_over_all_its_blocks(temperature, vocabulary, of_parts):
    import cupy

    logits = (np.random.default_rng(3).standard_normal((8, vocabulary)) * 3).astype(np.float32)
    for row, pair in enumerate(([0, 1], [5, vocabulary - 1], [3000, 40000])):
        logits[row, pair] = 30.0  # equals in one block, or far apart
    params = SamplingParams(seed=5, temperature=temperature)
    rows, positions = [params.row(i, 0, -1) for i in range(8)], np.arange(8) * 100
    full = choose(cupy, logits, rows, positions)
    plain = choose(cupy, logits, rows, positions, plain=True)
    np.testing.assert_array_equal(plain[2]["id"], full[2]["id"])
    np.testing.assert_allclose(plain[2]["logprob"], full[2]["logprob"], atol=4e-6)


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
    "min_new_tokens": {"temperature": 1.0, "max_new_tokens": None, "min_new_tokens": 100},
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


def test_noise_is_philox_of_seed_position_and_token_id():
    """The promise, spelled out: word id % 4 of counter (id // 4, position, 0, 0) under the seed."""
    for seed, position, token in [(0, 0, 0), (5, 3, 6), (2**64 - 1, 2**20, V - 1), (2**33, 1, 2)]:
        counter = np.array([[token // 4, position, 0, 0]], np.uint32)
        bits = int(reference_sampling.philox(counter, seed)[0, token % 4])
        u = min((bits + 0.5) / 2**32, 1 - 2.0**-24)
        noise = reference_sampling.gumbel(seed, position, V)
        np.testing.assert_allclose(noise[token], -np.log(-np.log1p(-u)), rtol=1e-5, atol=1e-6)
        # The size of the vocabulary does not matter.
        np.testing.assert_array_equal(
            noise[: token + 1], reference_sampling.gumbel(seed, position, token + 1)
        )


def test_a_choice_does_not_depend_on_its_row(xp):
    logits = np.random.default_rng(0).standard_normal((6, V)).astype(np.float32)
    rows = [SamplingParams(temperature=1.0, seed=seed).row(0, 0, -1) for seed in range(6)]
    positions = np.arange(6) * 7
    together = choose(xp, logits, rows, positions)[0]
    turned = choose(xp, logits[::-1], rows[::-1], positions[::-1])[0]
    alone = [
        choose(xp, logits[i : i + 1], rows[i : i + 1], positions[i : i + 1])[0][0] for i in range(6)
    ]
    assert together.tolist() == turned[::-1].tolist() == alone


TOKENS = np.arange(16) * 61 + 3  # the probable ones, across the vocabulary
LIKELY = np.random.default_rng(8).permutation(np.linspace(-1.5, 1.5, 16))


def likely_logits(count: int) -> np.ndarray:
    logits = np.full((count, V), -60, np.float32)
    logits[:, TOKENS] = LIKELY
    return logits


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def kept_by(p: np.ndarray, keep: np.ndarray) -> np.ndarray:
    return np.where(keep, p, 0) / p[keep].sum()


def rank(p: np.ndarray) -> np.ndarray:
    """0 for the most probable."""
    return (-p).argsort().argsort()


def nucleus(p: np.ndarray, mass: float) -> np.ndarray:
    ordered = np.sort(p)[::-1]
    return rank(p) <= np.count_nonzero(np.cumsum(ordered) < mass)


# Options, and the distribution over TOKENS that they ask for, in float64.
DISTRIBUTIONS = {
    "softmax": ({}, softmax(LIKELY)),
    "cold": ({"temperature": 0.6}, softmax(LIKELY / 0.6)),
    "hot": ({"temperature": 1.7}, softmax(LIKELY / 1.7)),
    "top_k": ({"top_k": 5}, kept_by(softmax(LIKELY), rank(LIKELY) < 5)),
    "top_p": ({"top_p": 0.7}, kept_by(softmax(LIKELY), nucleus(softmax(LIKELY), 0.7))),
    "min_p": (
        {"min_p": 0.3},
        kept_by(softmax(LIKELY), softmax(LIKELY) >= 0.3 * softmax(LIKELY).max()),
    ),
    "top_p after top_k": (
        {"top_k": 8, "top_p": 0.8},
        kept_by(
            softmax(LIKELY),
            nucleus(kept_by(softmax(LIKELY), rank(LIKELY) < 8), 0.8),
        ),
    ),
    "top_p after temperature": (
        {"temperature": 0.6, "top_p": 0.9},
        kept_by(softmax(LIKELY / 0.6), nucleus(softmax(LIKELY / 0.6), 0.9)),
    ),
}


def chi_square_limit(freedom: int) -> float:
    """Close to the 99.99 % quantile (Wilson and Hilferty); seeds are fixed, so nothing flickers."""
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 3.72 * spread**0.5) ** 3


@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_samples_follow_the_distribution(xp, case):
    """Chi-square of the tokens drawn at 4096 positions, and nothing outside the kept set."""
    options, expected = DISTRIBUTIONS[case]
    draws = 4096
    params = SamplingParams(seed=11, **{"temperature": 1.0} | options)
    rows = [params.row(0, 0, -1)] * draws
    ids, *_ = choose(xp, likely_logits(draws), rows, np.arange(draws), plain=params.plain)
    observed = np.array([np.count_nonzero(ids == token) for token in TOKENS])
    assert observed.sum() == draws
    assert not observed[expected == 0].any()
    wanted = expected[expected > 0] * draws
    assert wanted.min() > 5
    statistic = float(((observed[expected > 0] - wanted) ** 2 / wanted).sum())
    assert statistic < chi_square_limit(len(wanted) - 1)


@pytest.mark.parametrize("step", ["position", "seed"])
def test_neighbouring_draws_are_independent(xp, step):
    """Chi-square of pairs: what follows at the next position, or under the next seed."""
    draws = 4096
    logits = np.full((draws, V), -60, np.float32)
    logits[:, TOKENS[:4]] = 0
    seeds = np.arange(draws) if step == "seed" else np.full(draws, 3)
    rows = [SamplingParams(temperature=1.0, seed=int(seed)).row(0, 0, -1) for seed in seeds]
    positions = np.zeros(draws) if step == "seed" else np.arange(draws)
    ids, *_ = choose(xp, logits, rows, positions)
    places = np.searchsorted(TOKENS, ids)
    pairs = np.bincount(4 * places[::2] + places[1::2], minlength=16)
    expected = draws / 2 / 16
    assert ((pairs - expected) ** 2 / expected).sum() < chi_square_limit(15)


@given(
    st.lists(st.integers(0, 5), min_size=8, max_size=8),
    st.sets(st.integers(0, 7)),
    st.floats(-2, 2, width=32),
    st.floats(-2, 2, width=32),
    st.floats(0.25, 4, width=32),
)
def test_penalties_are_their_formulas(times, prompt, presence, frequency, repetition):
    """OpenAI's presence and frequency count what was generated, repetition the prompt as well."""
    logits = np.linspace(-3, 3, 8).astype(np.float32)
    params = SamplingParams(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition
    )
    counts = np.array(times, np.int32)
    counts[list(prompt)] |= PROMPT_BIT
    found = reference_sampling.process_logits(logits, params.row(0, 0, -1)[0], 0, counts, None)
    for token, logit in enumerate(logits.astype(np.float64)):
        if times[token] or token in prompt:
            logit = logit * repetition if logit < 0 else logit / repetition
        logit -= frequency * times[token] + presence * (times[token] > 0)
        assert abs(found[token] - logit) <= 1e-5


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


def test_a_target_in_a_row_that_is_not_finite_has_no_logprob(xp):
    logits = np.full((12, VP), np.nan, np.float32)
    logits[:, :V] = rows_that_are_not_all_numbers()
    ours = ops.target_logprobs(xp.asarray(logits), V, xp.zeros(12, np.int32))
    ours = ours if xp is np else ours.get()
    assert np.isnan(ours).tolist() == [i not in (6, 7, 9) for i in range(12)]
