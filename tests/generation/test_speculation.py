"""Look-up speculation: the same text in fewer steps."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
import pytest
from builders import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2cupy
from gpt2cupy import GPT2, GPT2Config, SamplingParams
from gpt2cupy.errors import InputError
from gpt2cupy.generation.draft_rows import DraftPolicy
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.generation.results import tokens_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDE = GPT2Config(vocab_size=40, n_positions=96, n_embd=128, n_layer=2, n_head=2)


@functools.cache
def model_on(device, config=WIDE, invariant=True):
    # A small vocabulary and weak layers: greedy texts soon repeat themselves.
    weights = GPT2.random(config, 5, device=device).weights
    return GPT2(config, weights, batch_invariant=invariant)


@functools.cache
def engine_on(device):
    return Engine(model_on(device), 1)


def request(prompt=(3, 1, 4, 1, 5), tokens=60, eos=(), **options):
    options = {"temperature": 0, "speculate": "ngram"} | options
    params = SamplingParams(max_new_tokens=tokens, **options)
    return Request("text", np.array(prompt, np.int32), params, eos=eos)


def run(engine, wanted):
    """The tokens of a request, and what it came to."""
    found, over = [], None
    for block in engine.blocks([wanted]):
        tops = [[]] * len(block.keys)
        found += [(t.id, t.logprob, t.finish_reason, t.top) for t in tokens_of(block)]
        over = over or next(iter(block.finished), None)
        assert len(tops) == len(block.keys)
    return found, over


def steps_of(engine, wanted):
    before = engine.rows.steps
    result = run(engine, wanted)
    return engine.rows.steps - before, result


# -- the look-up -----------------------------------------------------------------------------------


def naive(history, last, count):
    """The same by trying every place and every length."""
    text = [int(id_) for id_ in history[: last + 1]]
    best = (0, -1)
    for end in range(last):
        length = 0
        while length < 8 and length <= end and text[end - length] == text[last - length]:
            length += 1
        if length >= 2:
            best = max(best, (length, end))
    if best[1] < 0:
        return [-1] * count
    for step in range(count):
        text.append(text[best[1] + 1 + step])
    return text[last + 1 :]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 3))
def test_the_longest_and_latest_match_is_continued(ids, drafts):
    from gpt2cupy.ops.reference_sampling import continuation

    history = np.array([*ids, 7, 7, 7], np.int32)
    assert continuation(history, len(ids) - 1, drafts) == naive(history, len(ids) - 1, drafts)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 59))
def test_the_policy_is_that_of_the_same_tokens_however_they_come(ids, start):
    start = min(start, len(ids))
    policy = DraftPolicy(np.array(ids[:start], np.int32))
    for id_ in ids[start:]:
        policy.push([id_], 1)
    assert 0 <= policy.hit_rate <= 1 and policy.rows in (1, 2, 4)
    pairs = itertools.pairwise(ids)
    assert policy._after == dict(zip(pairs, ids[2:], strict=False))


def test_the_policy_follows_the_text():
    assert DraftPolicy(np.arange(50, dtype=np.int32)).rows == 1
    policy = DraftPolicy(np.tile(np.arange(5, dtype=np.int32), 10))
    assert policy.rows == 4
    for id_ in range(100, 110):
        policy.push([id_], 1)
    assert policy.rows == 1


def test_drafts_that_do_not_stand_are_left_out_for_a_while():
    text = np.tile(np.arange(5, dtype=np.int32), 10)
    policy, widths = DraftPolicy(text), []
    for place in range(200):  # goes on as before, but the look-up of the device finds nothing
        widths.append(policy.rows)
        policy.push([place % 5], widths[-1])
    tried = [place for place, rows in enumerate(widths) if rows > 1]
    assert widths[0] == 4 and len(tried) < 20
    pauses = [gap for gap in np.diff(tried) if gap > 1]
    assert pauses[:3] == [17, 33, 65], "each twice as long as the one before"
    policy = DraftPolicy(text)
    for place in range(0, 200, 4):
        assert policy.rows == 4
        policy.push([id_ % 5 for id_ in range(place, place + 4)], 4)


# -- texts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [0, 0.4])
def test_a_text_that_repeats_itself_takes_fewer_steps(temperature, device):
    engine = engine_on(device)
    options = {"temperature": temperature, "seed": 3}
    prompt = [3, 1, 4, 1, 5] * 4
    count, (plain, _) = steps_of(engine, request(prompt, speculate=None, **options))
    fewer, (found, over) = steps_of(engine, request(prompt, **options))
    assert found == plain
    assert 0 <= over.accepted <= over.drafted
    if not temperature:
        assert fewer < 0.6 * count and over.accepted > 0.7 * over.drafted


@pytest.mark.parametrize("device", DEVICES)
def test_a_text_without_repeats_takes_as_many_steps(device):
    engine = Engine(model_on(device, TINY), 1)
    options = {"temperature": 3.0, "seed": 3, "tokens": 40}
    count, (plain, _) = steps_of(engine, request(speculate=None, **options))
    same, (found, over) = steps_of(engine, request(**options))
    assert found == plain and same == count
    assert over.drafted == over.accepted == 0


OPTIONS = st.fixed_dictionaries(
    {
        "tokens": st.sampled_from([1, 2, 3, 5, 9, 17, 30, 92]),
        "temperature": st.sampled_from([0, 0.3, 1.0]),
        "seed": st.integers(0, 5),
        "top_k": st.sampled_from([0, 3]),
        "logprobs": st.sampled_from([None, 2]),
        "min_new_tokens": st.sampled_from([0, 9]),
        "eos": st.sampled_from([(), (7,), (7, 8, 9)]),
        "stop_token_ids": st.sampled_from([(), (2, 11)]),
        "logit_bias": st.sampled_from([{}, {5: 4.0}]),
    }
)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25, deadline=None)
@given(OPTIONS, st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 3))
def test_the_text_is_the_same(device, options, prompt, lead):
    # To the end of the context too, past which rows may run on.
    options["tokens"] = min(options["tokens"], WIDE.n_positions + 1 - len(prompt))
    options["min_new_tokens"] = min(options["min_new_tokens"], options["tokens"])
    engine = Engine(model_on(device), 1, lead=lead)
    plain, _ = run(engine_on(device), request(prompt, speculate=None, **options))
    found, over = run(engine, request(prompt, **options))
    assert found == plain
    assert over.ids.tolist() == [id_ for id_, *_ in plain]
    again, _ = run(engine, request(prompt, **options))
    assert again == found, "another text before leaves nothing behind"
    assert engine.idle and not engine.results.alive.any()
    assert engine.cache.lengths.tolist() == [0]


def test_the_engine_counts_the_drafts_of_all_texts():
    engine = Engine(model_on("cpu"), 1)
    wanted = [request([3, 1] * 5), request([3, 1] * 5, speculate=None), request([2] * 4)]
    wanted = [dataclasses.replace(each, key=i) for i, each in enumerate(wanted)]
    done = [each for block in engine.blocks(wanted) for each in block.finished]
    assert engine.drafted == sum(each.drafted for each in done) > 0
    assert engine.accepted == sum(each.accepted for each in done) > 0
    assert sum(each.drafted > 0 for each in done) == 2


@pytest.mark.parametrize("device", DEVICES)
def test_texts_with_and_without_take_turns(device):
    engine = Engine(model_on(device), 1, lead=3)
    prompts = [[3, 1] * 5, [4], [2, 2, 2, 2]]
    wanted = [
        Request((i, how), np.array(p, np.int32), request(speculate=how, tokens=30).params)
        for i, p in enumerate(prompts)
        for how in (None, "ngram")
    ]
    found = {}
    for token in engine.run(wanted):
        found.setdefault(token.key, []).append((token.id, token.logprob))
    for i in range(len(prompts)):
        assert found[i, "ngram"] == found[i, None]


@pytest.mark.parametrize("device", DEVICES)
def test_a_cancelled_text_gives_no_more_tokens(device):
    engine = Engine(model_on(device), 1)
    plain, _ = run(engine, request(speculate=None))
    engine.submit(request([3, 1, 4, 1, 5]))
    found = []
    while len(found) < 20:
        found += [(t.id, t.logprob, t.finish_reason, t.top) for t in tokens_of(engine.step())]
    engine.cancel("text")
    while not engine.idle:
        assert not engine.step().keys
    assert found == plain[: len(found)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_step_that_fails_leaves_nothing_behind(device, monkeypatch):
    engine = Engine(model_on(device), 1)
    expected, _ = run(engine, request())
    calls = iter(range(1000))
    whole = engine.running.rows.step

    def broken(running):
        whole(running)
        if next(calls) == 10:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.running.rows, "step", broken)
        with pytest.raises(KeyboardInterrupt):
            run(engine, request())
    assert run(engine, request())[0] == expected


# -- through the public names ----------------------------------------------------------------------


def test_generate_says_what_stood():
    with gpt2cupy.load("shakespeare", device="cpu") as lm:
        text = "And the king and the king and the king and the"
        plain = lm.generate(text, max_new_tokens=40)
        done = lm.generate(text, max_new_tokens=40, speculate="ngram")
        assert done.tokens == plain.tokens
        np.testing.assert_allclose(done.logprobs, plain.logprobs, rtol=1e-4, atol=1e-5)
        assert done.drafted >= done.accepted > 0 == plain.drafted
        pieces = list(lm.stream(text, max_new_tokens=40, speculate="ngram", stop=["\n\n"]))
        assert [piece.token for piece in pieces] == plain.tokens[: len(pieces)]
        last = list(lm.stream(text, max_new_tokens=40, speculate="ngram"))[-1]
        assert (last.drafted, last.accepted) == (done.drafted, done.accepted)
        stopped = lm.generate(text, max_new_tokens=40, speculate="ngram", stop=["king"], logprobs=1)
        assert len(stopped.top) == len(stopped.tokens)
        with pytest.raises(InputError, match="one text at a time"):
            lm.generate([text, text], max_new_tokens=4, speculate="ngram")
        both = lm.generate([text, text], max_new_tokens=9, speculate="ngram", max_batch=1)
        assert [each.tokens for each in both] == [plain.tokens[:9]] * 2


@pytest.mark.parametrize("penalty", ["repetition", "presence", "frequency"])
def test_penalties_exclude_it(penalty):
    with pytest.raises(InputError, match="exclude each other"):
        SamplingParams(speculate="ngram", **{f"{penalty}_penalty": 1.2})


@pytest.mark.parametrize("wrong", ["yes", 1, True])
def test_its_name_is_known(wrong):
    with pytest.raises(InputError, match="speculate"):
        SamplingParams(speculate=wrong)


# -- random arrivals -------------------------------------------------------------------------------

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 40)),
        st.tuples(st.just("cancel"), st.integers(0, 8)),
        st.tuples(st.just("step"), st.integers(1, 12)),
        st.tuples(st.just("fail"), st.sampled_from(["step", "read"])),
    ),
    max_size=20,
)


def numbered(key, tokens, *, plain=False):
    """Greedy and sampled texts that repeat themselves, each other one speculating."""
    options = {} if key % 3 else {"temperature": 0.3, "seed": key}
    how = None if plain or key % 2 else "ngram"
    wanted = request([3, 1, 4] * (1 + key % 4), tokens=tokens, speculate=how, **options)
    return Request(key, wanted.prompt, wanted.params, eos=(7,) if key % 4 else ())


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25, deadline=None)
@given(EVENTS, st.integers(0, 3), st.booleans())
def test_random_arrivals_cancels_and_failures(device, events, lead, keeps):
    engine = Engine(model_on(device), 1, lead=lead, prefix_cache=keeps)
    found, wanted, cancelled, over = {}, {}, set(), set()

    def take(block):
        for token in tokens_of(block):
            found.setdefault(token.key, []).append((token.id, token.logprob))
        over.update(done.request.key for done in block.finished)

    def broken(*args, **options):
        raise KeyboardInterrupt

    for kind, what in events:
        if kind == "submit":
            wanted[len(wanted)] = numbered(len(wanted), what)
            engine.submit(wanted[len(wanted) - 1])
        elif kind == "cancel":
            engine.cancel(what)
            cancelled |= {what} & wanted.keys()
        elif kind == "step":
            for _ in range(what):
                take(engine.step())
        else:
            rows = engine.running.rows
            setattr(rows, what, broken)
            try:
                take(engine.step())
            except KeyboardInterrupt:  # it ends all that were there
                assert engine.idle
                cancelled |= wanted.keys() - over
            finally:
                delattr(rows, what)
    while not engine.idle:
        take(engine.step())
    for key, each in wanted.items():
        same = numbered(key, each.params.max_new_tokens, plain=True)
        expected = [(t.id, t.logprob) for t in engine_on(device).run([same])]
        got = found.get(key, [])
        assert got == (expected[: len(got)] if key in cancelled else expected)
    assert engine.cache.lengths.tolist() == [0]
