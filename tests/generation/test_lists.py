"""Lists and iterators of prompts: settings for each, pieces of several, progress, memory."""

from __future__ import annotations

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_lm import DEVICES, shakespeare_tokenizer, small_lm

from gpt2cupy import Completion, SamplingParams
from gpt2cupy.errors import BusyError, InputError
from gpt2cupy.generation.collect import StopFinder
from gpt2cupy.generation.text import GrowingText

PROMPTS = ["ROMEO:", "To be, or not", [5, 6, 7], "", "JULIET:\nO Romeo", "KING", "A", "B", "C"]
SHORT = {"max_new_tokens": 6, "temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module", params=DEVICES)
def lm(request, tmp_path_factory):
    with small_lm(tmp_path_factory.mktemp("small"), request.param) as lm:
        yield lm


def texts(found):
    """What does not depend on the last bits of a sum."""
    found = [found] if isinstance(found, Completion) else list(found)
    return [
        texts(each)
        if isinstance(each, list)
        else (each.text, each.tokens, each.finish_reason, each.prompt_ids, each.seed)
        for each in found
    ]


def test_each_prompt_may_have_settings_of_its_own(lm):
    own = [SamplingParams(max_new_tokens=n, temperature=0.9, seed=n) for n in (2, 5, 3)]
    alone = [lm.generate(p, s) for p, s in zip(PROMPTS, own, strict=False)]
    assert texts(lm.generate(PROMPTS[:3], own)) == texts(alone)
    assert [len(each.tokens) for each in alone] == [2, 5, 3]
    # Options go before all of them, and n may differ.
    several = lm.generate(["a", "b"], [SamplingParams(n=2), SamplingParams()], max_new_tokens=2,
                          temperature=1.0, seed=1)  # fmt: skip
    assert len(several[0]) == 2 and several[1].tokens
    assert texts(lm.generate(iter(PROMPTS[:3]), iter(own))) == texts(alone)


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        (["a", "b"], [SamplingParams()], "1 SamplingParams for 2 prompts"),
        ("a", [SamplingParams()], "1 SamplingParams for one prompt"),
        (["a"], ["b"], "params cannot be a str"),
        (["a"], "b", "params cannot be a str"),
    ],
)
def test_settings_that_do_not_fit_the_prompts(lm, prompt, params, says):
    for call in (lm.generate, lm.stream):
        with pytest.raises(InputError, match=says):
            call(prompt, params)


@pytest.mark.parametrize(
    ("prompts", "params", "says"), [(3, 2, "more prompts"), (2, 3, "more Sam")]
)
def test_settings_that_end_before_the_iterator_of_prompts(lm, prompts, params, says):
    found = lm.generate(iter("abc"[:prompts]), iter([SamplingParams(max_new_tokens=1)] * params))
    assert len([next(found), next(found)]) == 2
    with pytest.raises(InputError, match=says):
        next(found)


@pytest.mark.parametrize("max_batch", [1, 2, 16])
def test_an_iterator_gives_the_completions_of_a_list_in_order(lm, max_batch):
    expected = texts(lm.generate(PROMPTS, **SHORT))
    assert texts(lm.generate(iter(PROMPTS), max_batch=max_batch, **SHORT)) == expected
    pairs = texts(lm.generate(iter(PROMPTS[:3]), max_batch=max_batch, n=2, **SHORT))
    assert pairs == texts(lm.generate(PROMPTS[:3], n=2, **SHORT))


def test_an_iterator_without_prompts_or_tokens(lm):
    assert list(lm.generate(iter([]))) == []
    assert [each.text for each in lm.generate(iter(["a", "b"]), max_new_tokens=0)] == ["", ""]
    assert lm.generate(["a", "b"], max_new_tokens=0)[1].tokens == []
    assert list(lm.stream(iter([]))) == list(lm.stream(["a"], max_new_tokens=0)) == []


def test_an_iterator_is_read_as_slots_become_free(lm):
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield "a"

    found = lm.generate(endless(), max_batch=2, max_new_tokens=2)
    assert not read
    for _ in range(40):
        next(found)
    assert len(read) < 40 + 4 * 2 + 3
    with pytest.raises(BusyError):
        lm.generate("b")
    found.close()
    assert lm.generate("b", max_new_tokens=1).tokens


def test_a_text_that_takes_long_does_not_let_memory_grow(lm):
    read = []

    def source():
        for number in range(400):
            read.append(number)
            yield "a"

    own = itertools.chain(
        [SamplingParams(max_new_tokens=100, eos_token_id=-1)],
        itertools.repeat(SamplingParams(max_new_tokens=1), 399),
    )
    found = lm.generate(source(), own, max_batch=4)
    next(found)
    assert len(read) < 40  # though some hundred others could have run meanwhile
    assert sum(1 for _ in found) == 399


def test_a_prompt_of_an_iterator_that_cannot_be_is_an_error_in_its_place(lm):
    found = lm.generate(iter(["a", "b", 5, "c"]), max_new_tokens=3)
    assert len([next(found), next(found)]) == 2
    with pytest.raises(InputError, match=r"cannot be an int \(prompt 2, 5\)"):
        next(found)

    def broken():
        yield "a"
        raise ValueError("theirs")

    found = lm.generate(broken(), max_new_tokens=2)
    assert next(found).tokens
    with pytest.raises(ValueError, match="theirs"):
        next(found)


def test_memory_does_not_grow_with_the_number_of_prompts(lm):
    if lm.device != "cpu":
        pytest.skip("the same code as on the CPU")

    def most(count: int) -> int:
        tracemalloc.start()
        for _ in lm.generate(itertools.repeat("a", count), max_new_tokens=1):
            pass
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(10)
    assert most(400) < 1.5 * most(100)


# -- pieces ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, iter])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_pieces_of_several_prompts_name_the_prompt(lm, kind, max_batch):
    found = [[] for _ in PROMPTS]
    for number, piece in lm.stream(kind(PROMPTS), max_batch=max_batch, **SHORT):
        found[number].append(piece)
    for pieces, prompt in zip(found, PROMPTS, strict=True):
        alone = lm.generate(prompt, **SHORT)
        assert "".join(piece.text for piece in pieces) == alone.text
        assert [piece.token for piece in pieces] == alone.tokens
        reasons = [None] * (len(pieces) - 1) + [alone.finish_reason]
        assert [piece.finish_reason for piece in pieces] == reasons
        assert pieces[0].prefill_seconds > 0 == pieces[0].tokens_per_second


def test_pieces_of_several_prompts_come_side_by_side(lm):
    numbers = [number for number, _ in lm.stream(["a", "b"], max_new_tokens=3)]
    assert numbers == [0, 1, 0, 1, 0, 1]
    assert lm.generate("a", max_new_tokens=1).tokens  # and the model is free


def test_a_stop_string_ends_one_of_several_streams(lm):
    free = lm.generate("ROMEO:", max_new_tokens=30)
    stop = free.text[6:9]
    found = ["", ""]
    for number, piece in lm.stream(["ROMEO:", "KING"], max_new_tokens=30, stop=stop):
        found[number] += piece.text
    assert found[0] == free.text[: free.text.index(stop)]
    done = lm.generate(["ROMEO:", "KING"], max_new_tokens=30, stop=stop)
    assert found == [each.text for each in done]


# -- stop strings ---------------------------------------------------------------------------------

STOPS = ["a", ". ", "\n\n", "é", "の", "ab", "\ufffd", "a\ufffd", "\u0416x"]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(STOPS), min_size=1, max_size=3),
    st.text("ab.\n éのЖx\ufffd", max_size=12),
    st.lists(st.integers(0, 255), max_size=4),
)
def test_a_stop_string_is_found_at_the_token_that_completes_it(stops, text, odd):
    """As a streaming decoder finds it, which looks at all text."""
    tokenizer = shakespeare_tokenizer()
    finder, growing = StopFinder(tokenizer), GrowingText(tokenizer, stops)
    ids = tokenizer.encode(text)
    ids = ids[: len(ids) // 2] + odd + ids[len(ids) // 2 :]
    may_end = finder.may_end(stops)
    for count, id_ in enumerate(ids, 1):
        expected = growing.push(id_, None)[1] == "stop"
        assert (may_end[id_] and finder.found(stops, np.array(ids[:count]))) == expected
        if expected:
            break


def test_stop_strings_do_not_depend_on_neighbours(lm):
    options = {"max_new_tokens": 30, "temperature": 1.0, "seed": 5, "logprobs": 2}
    own = [SamplingParams(stop=stop, **options) for stop in ("e", "th", ("\n", "."), "\ufffd", ())]
    together = lm.generate(["ROMEO:"] * 5, own)
    for each, params in zip(together, own, strict=True):
        pieces = list(lm.stream("ROMEO:", params))
        assert each.text == "".join(piece.text for piece in pieces)
        assert each.tokens == [piece.token for piece in pieces]
        assert each.finish_reason == pieces[-1].finish_reason
        for one, other in zip(each.top, pieces, strict=True):
            assert one == [(id_, pytest.approx(value, abs=1e-5)) for id_, value in other.top]


# -- progress -------------------------------------------------------------------------------------


def test_a_bar_is_shown_where_it_is_asked_for(lm, capsys):
    lm.generate(["a", "b", "c"], max_new_tokens=1, progress=True)
    assert "3/3" in capsys.readouterr().err
    list(lm.generate(iter("abc"), max_new_tokens=1, progress=True))
    assert "3text" in capsys.readouterr().err
    lm.generate(["a"] * 20, max_new_tokens=1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("texts", "progress", "shown"), [
    (3, None, True), (2, None, False), (3, False, False), (1, True, True),
])  # fmt: skip
def test_on_a_terminal_a_long_list_has_a_bar(lm, capsys, monkeypatch, texts, progress, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    lm.generate(["a"] * texts, max_new_tokens=1, max_batch=2, progress=progress)
    assert (f"{texts}/{texts}" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("progress", [1, "yes"])
def test_a_progress_that_cannot_be(lm, progress):
    with pytest.raises(InputError, match="progress="):
        lm.generate(["a"], progress=progress)
