"""Scoring: log-probabilities by a sliding window, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gpt2cupy
from gpt2cupy.errors import InputError

TEXT = "To be, or not to be: that is the question.\n"


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


def window_by_window(lm, tokens, window, stride):
    """Log-probability of each token after the first, windows looped by hand."""
    scores = {}
    for start in range(0, len(tokens), stride):
        part = tokens[start : start + window]
        logits = lm(np.array([part]))[0].astype(np.float64)
        logprobs = logits - logits.max(axis=-1, keepdims=True)
        logprobs -= np.log(np.exp(logprobs).sum(axis=-1, keepdims=True))
        for place in range(len(part)):
            target = start + place + 1
            if target < len(tokens):
                scores.setdefault(target, logprobs[place, tokens[target]])
    return np.array([scores[target] for target in sorted(scores)])


@pytest.mark.parametrize(
    "window, stride",
    [(512, 256), (16, 8), (16, 16), (16, 1), (7, 3), (1, 1), (20, 19), (29, 29), (30, 15)],
)
@pytest.mark.parametrize("bos", [True, False])
def test_score_equals_a_loop_over_windows(lm, window, stride, bos):
    ids = lm.tokenizer.encode(TEXT * 2)
    score = lm.score(TEXT * 2, window=window, stride=stride, bos=bos)
    tokens = [lm.tokenizer.eot_token, *ids] if bos else ids
    assert score.tokens == tokens[1:]
    expected = window_by_window(lm, tokens, window, stride)
    np.testing.assert_allclose(score.logprobs, expected, rtol=0, atol=2e-4)


def test_score_of_text_shorter_and_longer_than_a_window(lm):
    tokens = [lm.tokenizer.eot_token, *lm.tokenizer.encode(TEXT)]
    for window in (len(tokens) - 2, len(tokens) - 1, len(tokens)):
        score = lm.score(TEXT, window=window, stride=window)
        expected = window_by_window(lm, tokens, window, window)
        np.testing.assert_allclose(score.logprobs, expected, rtol=0, atol=2e-4)


def test_score_agrees_with_generate(lm):
    done = lm.generate("ROMEO:", max_new_tokens=10)
    prompt = lm.tokenizer.encode("ROMEO:")
    score = lm.score([*prompt, *done.tokens], bos=False)
    np.testing.assert_allclose(score.logprobs[len(prompt) - 1 :], done.logprobs, atol=2e-4)


def test_perplexity_and_bits_per_byte(lm):
    score = lm.score(TEXT)
    mean = float(score.logprobs.astype(np.float64).mean())
    assert score.perplexity == pytest.approx(math.exp(-mean))
    assert score.total == pytest.approx(mean * len(score.tokens))
    bits = -mean * len(score.tokens) / math.log(2) / len(TEXT)
    assert score.bits_per_byte(TEXT) == pytest.approx(bits)
    assert 0.5 < bits < 3


@pytest.mark.parametrize(
    "text, options",
    [
        ("", {}),
        ("a", {"bos": False}),
        ("ab", {"window": 0}),
        ("ab", {"window": 513}),
        ("ab", {"window": 8, "stride": 9}),
        ("ab", {"stride": 0}),
        ("ab", {"window": 2.0}),
        ("ab", {"stride": "1"}),
        ("ab", {"window": True}),
        (None, {}),
        (b"ab", {}),
        ([5, [6]], {}),
        ([5, 2048, 5], {}),
    ],
)
def test_score_refuses_the_impossible(lm, text, options):
    with pytest.raises(InputError) as caught:
        lm.score(text, **options)
    assert caught.value.where and caught.value.remedy
    assert len(lm.score(TEXT).tokens)


def test_score_checks_the_last_id_too(lm):
    # It is only ever a target, so the check of a window's inputs does not see it.
    for wrong in (2048, -1):
        with pytest.raises(InputError, match=f"token id {wrong}"):
            lm.score([5, 6, wrong])
