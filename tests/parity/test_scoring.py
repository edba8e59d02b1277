"""score() against transformers: the same log-probabilities from the same windows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
pytest.importorskip("transformers", reason="parity needs torch and transformers")
pytestmark = pytest.mark.parity

TEXT = """ROMEO:
But, soft! what light through yonder window breaks?
It is the east, and Juliet is the sun.
Arise, fair sun, and kill the envious moon,
"""


def their_logprobs(model: Any, ids: list[int], window: int, stride: int) -> np.ndarray:
    """Each token's from the first window of inputs that reaches it."""
    found: dict[int, float] = {}
    for start in range(0, len(ids), stride):
        with torch.inference_mode():
            logits = model(torch.tensor([ids[start : start + window]])).logits[0]
        logprobs = logits.double().log_softmax(-1)
        for place in range(start + 1, min(start + window + 1, len(ids))):
            found.setdefault(place, float(logprobs[place - 1 - start, ids[place]]))
        if len(found) == len(ids) - 1:
            break
    return np.array([found[place] for place in range(1, len(ids))])


def assert_same_scores(
    lm: Any, theirs: Any, text: str, window: int | None, stride: int | None, atol: float = 2e-5
) -> None:
    ids = [lm.tokenizer.eot_token, *lm.tokenizer.encode(text)]
    score = lm.score(text, window=window, stride=stride)
    window = window or lm.config.n_positions
    expected = their_logprobs(theirs, ids, window, stride or max(window // 2, 1))
    assert score.tokens == ids[1:]
    print(f"largest difference {np.abs(score.logprobs - expected).max():.2e}")
    np.testing.assert_allclose(score.logprobs, expected, rtol=1e-5, atol=atol)
    assert math.isclose(score.perplexity, math.exp(-expected.mean()), rel_tol=1e-5)


@pytest.mark.parametrize(
    "window, stride", [(None, None), (16, 16), (16, 1), (24, 7), (1, 1), (33, None)]
)
def test_embedded_windows(embedded, their_embedded, window, stride):
    assert_same_scores(embedded, their_embedded, TEXT, window, stride)


@pytest.mark.parametrize("bos", [True, False])
def test_perplexity_is_that_of_their_loss(embedded, their_embedded, bos):
    ids = embedded.tokenizer.encode(TEXT)
    score = embedded.score(ids, bos=bos)
    fed = torch.tensor([[embedded.tokenizer.eot_token] * bos + ids])
    with torch.inference_mode():
        loss = float(their_embedded(fed, labels=fed).loss)
    assert math.isclose(score.perplexity, math.exp(loss), rel_tol=1e-5)
    assert len(score.logprobs) == fed.shape[1] - 1


def test_text_longer_than_the_context(embedded, their_embedded):
    """Windows of the whole context, half of it apart, as perplexity is usually measured."""
    ids = np.random.default_rng(0).integers(0, 1000, 700).tolist()
    window, stride = embedded.config.n_positions, embedded.config.n_positions // 2
    score = embedded.score(ids, bos=False)
    expected = their_logprobs(their_embedded, ids, window, stride)
    np.testing.assert_allclose(score.logprobs, expected, rtol=1e-5, atol=2e-5)


def test_logprobs_of_generated_tokens(embedded, their_embedded, their_logits):
    prompt = embedded.encode("ROMEO:").tolist()
    ours = embedded.generate(prompt, max_new_tokens=40, temperature=0.9, seed=3, eos_token_id=-1)
    ids = [*prompt, *ours.tokens]
    logits = torch.tensor(their_logits(their_embedded, ids[:-1])[0, len(prompt) - 1 :])
    expected = logits.double().log_softmax(-1).numpy()[range(40), ours.tokens]
    np.testing.assert_allclose(ours.logprobs, expected, rtol=1e-5, atol=2e-5)


def test_scores_of_the_chosen_model(chosen):
    lm, theirs = chosen
    # Logits of trained models are around -100, where float32's own steps are near 1e-5.
    atol = 1e-5 * float(np.abs(lm(lm.encode(TEXT))).max())
    assert_same_scores(lm, theirs, TEXT, None, None, atol)
    assert_same_scores(lm, theirs, TEXT, 16, 8, atol)
