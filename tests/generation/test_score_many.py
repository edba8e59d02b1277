"""Scoring of lists and of (context, continuation) pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_lm import DEVICES, small_lm

from gpt2cupy import Score
from gpt2cupy.errors import BusyError, InputError, NonFiniteError
from gpt2cupy.generation import scoring
from gpt2cupy.generation.scoring import Scorer, prompt_scores
from gpt2cupy.generation.windows import Window, windows

TEXTS = ["ROMEO:", "a", "To be, or not to be: " * 9, "aa aa the", "é" * 30, [5, 6, 7], "x" * 150]
PAIRS = [
    ("To be, or", " not to be"),
    ("To be, or ", "not to be"),
    ("aa", "aa"),
    ("", "a"),
    ("é", "é"),
    ([5, 6], [7]),
    ("a", [7, 8]),
    ([5], "bc"),
]


@pytest.fixture(scope="module", params=DEVICES)
def lm(request, tmp_path_factory):
    with small_lm(tmp_path_factory.mktemp("small"), request.param) as lm:
        yield lm


def same(one, other):
    assert one.tokens == other.tokens
    np.testing.assert_allclose(one.logprobs, other.logprobs, rtol=0, atol=5e-5)


def test_a_list_has_the_score_of_each(lm):
    found = lm.score(TEXTS)
    assert len(found) == len(TEXTS)
    for text, score in zip(TEXTS, found, strict=True):
        same(score, lm.score(text))
    for score, other in zip(lm.score(iter(TEXTS)), found, strict=True):
        same(score, other)
    windowed = lm.score(TEXTS, window=20, stride=7)
    for text, score in zip(TEXTS, windowed, strict=True):
        same(score, lm.score(text, window=20, stride=7))
    assert lm.score([]) == []


def test_a_pair_has_the_end_of_the_score_of_both(lm):
    for (context, continuation), score in zip(PAIRS, lm.score(PAIRS), strict=True):
        texts = isinstance(context, str) and isinstance(continuation, str)
        parts = [lm.encode(each).tolist() if isinstance(each, str) and each else list(each)
                 for each in (context, continuation)]  # fmt: skip
        whole = lm.score(context + continuation if texts else parts[0] + parts[1])
        count = len(score.tokens)
        assert score == Score(whole.tokens[-count:], score.logprobs)
        np.testing.assert_allclose(score.logprobs, whole.logprobs[-count:], rtol=0, atol=5e-5)
        if not texts:
            assert score.tokens == parts[1]
        # Its tokens have all its bytes, and without the first some are missing.
        elif continuation:
            size = len(continuation.encode())
            bytes_of = lm.tokenizer.decode_bytes
            assert len(bytes_of(score.tokens)) >= size > len(bytes_of(score.tokens[1:]))


def test_pairs_of_any_texts_are_cut_where_the_continuation_begins(lm):
    tokenizer = lm.tokenizer

    @settings(max_examples=60, deadline=None)
    @given(*[st.lists(st.sampled_from(["a", "aa", " the", "é", "の", " ", "h", "e"]))] * 2)
    def check(context, continuation):
        context, continuation = "".join(context), "".join(continuation)
        if not continuation:
            return
        (score,) = lm.score([(context, continuation)])
        ids = tokenizer.encode(context + continuation)
        assert score.tokens == ids[-len(score.tokens) :]
        size = len(continuation.encode())
        assert len(tokenizer.decode_bytes(score.tokens)) >= size
        assert len(tokenizer.decode_bytes(score.tokens[1:])) < size

    check()


def test_a_context_that_is_too_long_loses_its_beginning(lm):
    context = (list(range(1, 100)) * 3)[:250]
    (long,) = lm.score([(context, [7, 8, 9])], bos=False)
    kept = context[-(lm.config.n_positions - 2) :]  # the last token is no input
    (short,) = lm.score([(kept, [7, 8, 9])], bos=False)
    same(long, short)
    # A continuation that is itself too long slides on.
    (whole,) = lm.score([([1, 2, 3], context)], bos=False, window=50, stride=25)
    assert whole.tokens == context


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 60), st.data())
def test_windows_score_each_token_once_and_in_order(count, data):
    window = data.draw(st.integers(1, 20))
    stride = data.draw(st.integers(1, window))
    first = data.draw(st.integers(1, count - 1))
    tokens = np.arange(count, dtype=np.int32)
    found = windows(tokens, first, window, stride)
    scored = [token for each in found for token in each.tokens[each.first :].tolist()]
    assert scored == list(range(first, count))
    for each in found:
        assert 1 <= each.first <= len(each.tokens) - 1 <= window
        assert each.tokens.tolist() == list(range(each.tokens[0], each.tokens[-1] + 1))
    if first > 1 and count - 1 > window and len(found) == 1:
        assert len(found[0].tokens) == window + 1  # as much context as there is room for


def test_many_windows_of_all_lengths_fit_passes(lm, monkeypatch):
    monkeypatch.setattr(scoring, "ROWS", scoring.ROWS_ON_HOST)  # many passes on a GPU too
    rng = np.random.default_rng(0)
    size = lm.config.vocab_size
    given = []
    for length in [*rng.integers(2, 161, 80).tolist(), *[2] * 300, *[161] * 9, 3]:
        tokens = rng.integers(0, size, length).astype(np.int32)
        given.append(Window(tokens, int(rng.integers(1, length))))
    scorer = Scorer(lm.model)
    passes = list(scorer._passes(given))
    assert [each for several in passes for each in several] == given and len(passes) > 5
    for several in passes:
        lengths = [len(each.tokens) - 1 for each in several]
        assert sum(lengths) <= scorer.rows
        assert len(lengths) * max(lengths) <= 2 * scorer.rows
    found = list(scorer.run(given, top=3))
    assert len(found) == len(given)
    for each, window in zip(found, given, strict=True):
        assert each.logprobs.shape == (window.scored,)
        assert each.top[0].shape == each.top[1].shape == (window.scored, 3)
    for index in range(0, len(given), 97):
        (alone,) = scorer.run([given[index]], top=3)
        np.testing.assert_allclose(found[index].logprobs, alone.logprobs, rtol=0, atol=5e-5)
        np.testing.assert_allclose(found[index].top[1], alone.top[1], rtol=0, atol=5e-5)


def test_scores_of_prompts_have_the_most_probable_tokens(lm):
    ids = [np.array(each, np.int32) for each in ([5], [5, 6, 7], [9] * 160)]
    one, three, long = prompt_scores(Scorer(lm.model), ids, 2)
    assert one.logprobs == one.top == []
    assert len(three.logprobs) == len(three.top) == 2 and len(long.logprobs) == 159
    expected = lm.score([5, 6, 7], bos=False).logprobs
    np.testing.assert_allclose(three.logprobs, expected, rtol=0, atol=5e-5)
    logits = lm(np.array([[5, 6]]))
    logits = (logits if lm.device == "cpu" else logits.get())[0]
    for top, line in zip(three.top, logits, strict=True):
        assert [id_ for id_, _ in top] == np.argsort(-line, kind="stable")[:2].tolist()
    without = list(prompt_scores(Scorer(lm.model), ids, 0))
    assert without[1].top == [[], []]


@pytest.mark.parametrize(
    ("texts", "options", "says"),
    [
        (["a", ""], {"bos": False}, r"nothing to score \(text 1, ''\)|nothing to score"),
        ([("a", "")], {}, "nothing to score"),
        ([("", "a")], {"bos": False}, "nothing stands before the continuation|nothing to score"),
        (["a", 5], {}, "cannot be an int"),
        ([("a", 5)], {}, "must be integers|cannot be"),
        ([[10**6, 1]], {}, "outside the vocabulary"),
        (("a", "b"), {}, "a pair by itself"),
        (["a"], {"window": 0}, "window=0"),
        (["a"], {"bos": 1}, "bos is 1"),
        (["a"], {"progress": 1}, "progress=1"),
    ],
)
def test_what_cannot_be_scored(lm, texts, options, says):
    with pytest.raises(InputError, match=says):
        lm.score(texts, **options)


def test_an_error_of_an_iterator_stands_in_its_place(lm):
    found = lm.score(itertools.chain(["abc"] * 3, [5]))
    with pytest.raises(InputError, match=r"cannot be an int \(prompt 3, 5\)"):
        list(found)
    found = lm.score(iter(["abc", "d"]))
    next(found)
    with pytest.raises(BusyError):
        lm.generate("a")
    assert len(list(found)) == 1 and lm.generate("a", max_new_tokens=1).tokens


def test_a_bar_counts_texts(lm, capsys):
    lm.score(["a", "b", "c"], progress=True)
    assert "3/3" in capsys.readouterr().err


def test_a_text_without_finite_logits_does_not_spoil_the_others(tmp_path):
    with small_lm(tmp_path) as lm:
        lm.model.weights.wpe[5] = np.nan  # of texts that are so long
        texts = ["ab", [1, 2, 3, 4, 5, 6, 7, 8], [3, 4]]
        with pytest.raises(NonFiniteError, match="prompt 1") as caught:
            lm.score(texts, bos=False)
        assert caught.value.failed == ((1, 0),)
        one, none, three = caught.value.completions
        assert none is None
        assert [one, three] == lm.score([texts[0], texts[2]], bos=False)
        found = lm.score(iter(texts), bos=False)
        assert next(found) == one
        with pytest.raises(NonFiniteError, match="text 1"):
            next(found)


def test_one_pass_holds_its_keys_and_values_once(lm):
    cache = scoring._PassCache(lm.model, 100)
    cache.shape(5, 20)
    assert all(k is cache.layers[0][0] for k, _ in cache.layers)
    assert cache.layers[0][0].shape == (5, lm.config.n_head, 20, lm.config.head_size)
