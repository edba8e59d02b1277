"""The open engine: requests that come and go while others run, and arrays that come back."""

from __future__ import annotations

import functools
import threading

import numpy as np
import pytest
from builders import TINY, host
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.errors import InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.generation.results import tokens_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@functools.cache
def model_on(device):
    """Of which each text has the same bits beside any others."""
    return GPT2(TINY, GPT2.random(TINY, 3, device=device).weights, batch_invariant=True)


@functools.cache
def single(device):
    return Engine(model_on(device), 1)


END = 117  # a token that random texts choose now and then


def request(key, length=3, tokens=6, **options):
    prompt = (np.arange(length) * 5 + sum(map(ord, str(key))) % 11).astype(
        np.int32
    ) % TINY.vocab_size
    eos = options.pop("eos", END)
    priority = options.pop("priority", 0)
    params = SamplingParams(max_new_tokens=tokens, temperature=1.5, seed=4, **options)
    return Request(key, prompt, params, eos=eos, priority=priority)


def alone(wanted, device="cpu"):
    """What a request gives in an engine of its own."""
    return [(t.id, t.logprob, t.finish_reason) for t in single(device).run([wanted])]


def slots_of(engine):
    """The slots of all rows, after what was queued so far."""
    with engine.device, engine.stream:
        return host(engine.state.slots).copy()


def drained(engine, found):
    """Step until nothing is left, adding what comes to ``found``."""
    while not engine.idle:
        take(engine.step(), found)
    return found


def take(block, found):
    for token in tokens_of(block):
        found.setdefault(token.key, []).append((token.id, token.logprob, token.finish_reason))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [0, 1, 3])
def test_a_request_may_join_while_others_run(lead, device):
    engine, found = Engine(model_on(device), 4, lead=lead), {}
    early = [request(i, tokens=12, eos=-1) for i in range(3)]
    for each in early:
        assert engine.submit(each) == each.key
    for _ in range(5):
        take(engine.step(), found)
    assert found and not engine.idle
    late = request("late", length=9)
    engine.submit(late)
    drained(engine, found)
    assert found == {each.key: alone(each, device) for each in [*early, late]}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [0, 3])
def test_a_cancelled_request_gives_no_more_tokens(lead, device):
    engine, found = Engine(model_on(device), 2, lead=lead), {}
    for key in ("a", "b"):
        engine.submit(request(key, tokens=20, eos=-1))
    while len(found.get("a", [])) < 4:
        take(engine.step(), found)
    engine.cancel("a")
    engine.cancel("nobody")
    drained(engine, found)
    assert len(found["a"]) == 4 and len(found["b"]) == 20
    assert found["a"] == alone(request("a", tokens=20, eos=-1), device)[:4]
    assert engine.cache.lengths.tolist() == [0, 0]
    engine.submit(request("a"))  # the key is free again
    drained(engine, {})


def test_a_request_cancelled_while_it_waits_never_runs():
    engine, found = Engine(model_on("cpu"), 1), {}
    for key in range(3):
        engine.submit(request(key))
    engine.cancel(1)
    assert sorted(drained(engine, found)) == [0, 2]


def test_keys_are_unique_while_they_run():
    engine = Engine(model_on("cpu"), 1)
    engine.submit(request("k"))
    with pytest.raises(InputError, match="key 'k' is running"):
        engine.submit(request("k"))
    drained(engine, {})
    engine.submit(request("k"))


def test_a_prompt_longer_than_a_slot_is_refused():
    with pytest.raises(InputError, match="does not fit a slot of 8"):
        Engine(model_on("cpu"), 1, 8).submit(request("long", length=9))


def test_new_tokens_that_do_not_fit_a_slot_are_refused_and_none_given_fill_it():
    engine = Engine(model_on("cpu"), 1, 12)
    with pytest.raises(InputError, match="3 tokens of prompt and 11 new ones exceed a slot of 12"):
        engine.submit(request("long", tokens=11))
    with pytest.raises(InputError, match="at most 10"):
        engine.submit(of([3, 1, 4], min_new_tokens=11))
    for key, options in enumerate([{"max_new_tokens": 10}, {}, {"max_new_tokens": None}]):
        engine.submit(Request(key, np.array([3, 1, 4], np.int32), SamplingParams(**options)))
        assert len(drained(engine, {})[key]) == 10


def test_smaller_priorities_are_admitted_first():
    engine, order = Engine(model_on("cpu"), 1), []
    for key, priority in (("first", 0), ("late", 5), ("soon", -1), ("next", 0)):
        engine.submit(request(key, priority=priority))
    while not engine.idle:
        order += [done.request.key for done in engine.step().finished]
    assert order == ["soon", "first", "next", "late"]


@pytest.mark.parametrize("device", DEVICES)
def test_prompts_run_in_pieces_between_the_steps_of_others(device):
    engine, found = Engine(model_on(device), 2, lead=0), {}
    engine.scheduler.budget = 4
    engine.submit(request("short", length=2, tokens=30, eos=-1))
    while len(found.get("short", [])) < 3:
        take(engine.step(), found)
    long = request("long", length=22, tokens=2, eos=-1)
    engine.submit(long)
    before = len(found["short"])
    while "long" not in found:
        take(engine.step(), found)
    assert len(found["short"]) - before >= 22 // 4, "a token of the running text for each piece"
    drained(engine, found)
    assert found["long"] == alone(long, device)


def test_requests_are_read_as_slots_become_free():
    seen = []

    def source():
        for key in range(9):
            seen.append(key)
            yield request(key, tokens=4)

    engine = Engine(model_on("cpu"), 2)
    first = next(engine.run(source()))
    assert first.key == 0 and len(seen) <= 4
    assert len({token.key for token in engine.run(source())}) == 9


@pytest.mark.parametrize("device", DEVICES)
def test_rows_stay_compact(device):
    engine, widths = Engine(model_on(device), 4, lead=0), []
    for key in range(4):
        engine.submit(request(key, tokens=2 + 3 * ((key + 2) % 4), eos=-1))
    while not engine.idle:
        engine.step()
        rows = engine.scheduler.rows
        widths.append(len(rows))
        assert [sequence.row for sequence in rows] == list(range(len(rows)))
        used = np.flatnonzero(slots_of(engine) >= 0)
        assert used.tolist() == list(range(len(rows)))
    assert widths[-1] == 0 and max(widths) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_lines_of_finished_requests_are_used_again(device):
    engine = Engine(model_on(device), 3, lead=3)
    for _ in engine.run(request(key, tokens=2) for key in range(300)):
        pass
    assert len(engine.results.requests) <= 64
    assert engine.idle and not engine.results.alive.any()


def test_tokens_past_an_end_are_counted():
    sixth = alone(request("e", tokens=30, eos=-1))[5][0]
    ends = alone(request("e", tokens=30, eos=sixth))
    assert ends[-1][2] == "eos"
    engine = Engine(model_on("cpu"), 1, lead=3)
    engine.submit(request("e", tokens=30, eos=sixth))
    assert drained(engine, {})["e"] == ends
    assert engine.discarded == 3


@pytest.mark.parametrize("device", DEVICES)
def test_submit_and_cancel_from_other_threads(device):
    engine, found, wanted = (
        Engine(model_on(device), 4),
        {},
        [request(i, tokens=5) for i in range(40)],
    )

    def submit(part):
        for each in part:
            engine.submit(each)

    threads = [threading.Thread(target=submit, args=(wanted[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads) or not engine.idle:
        take(engine.step(), found)
    assert found == {each.key: alone(each, device) for each in wanted}


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(1, 20), st.integers(1, 12)),
        st.tuples(st.just("cancel"), st.integers(0, 12), st.none()),
        st.tuples(st.just("step"), st.integers(1, 5), st.none()),
    ),
    max_size=25,
)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=25, deadline=None)
@given(EVENTS, st.integers(1, 5), st.integers(0, 3), st.integers(1, 16))
def test_random_arrivals_and_cancels_against_one_text_at_a_time(
    device, events, slots, lead, budget
):
    engine, found, wanted, cancelled = Engine(model_on(device), slots, lead=lead), {}, {}, set()
    engine.scheduler.budget = budget
    for kind, number, tokens in events:
        if kind == "submit":
            key = len(wanted)
            wanted[key] = request(key, length=number, tokens=tokens)
            engine.submit(wanted[key])
        elif kind == "cancel":
            engine.cancel(number)
            cancelled |= {number} & wanted.keys()
        else:
            for _ in range(number):
                take(engine.step(), found)
    drained(engine, found)
    for key, each in wanted.items():
        expected, got = alone(each, device), found.get(key, [])
        assert got == (expected[: len(got)] if key in cancelled else expected)
    assert engine.cache.lengths.tolist() == [0] * slots
    assert (slots_of(engine) == -1).all()


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=9), st.integers(0, 3))
def test_the_same_requests_give_the_same_steps(device, lengths, lead):
    def blocks():
        engine = Engine(model_on(device), 3, lead=lead)
        given = [request(i, length=n) for i, n in enumerate(lengths)]
        return [(b.keys, b.ids.tolist(), b.logprobs.tolist()) for b in engine.blocks(given)]

    assert blocks() == blocks()


def of(prompt, **options):
    return Request("odd", np.array(prompt, np.int32), SamplingParams(**options), eos=())


@pytest.mark.parametrize(
    "wrong, says",
    [
        (of([]), "no token"),
        (of([3, -1]), "token id -1"),
        (of([3, TINY.vocab_size]), f"token id {TINY.vocab_size}"),
        (of([3], max_new_tokens=0), "no new token"),
        (of([3], logit_bias={TINY.vocab_size: 1.0}), "logit_bias"),
    ],
)
def test_a_request_that_would_break_a_step_is_refused_before_it(wrong, says):
    engine, found = Engine(model_on("cpu"), 2), {}
    engine.submit(request("good"))
    with pytest.raises(InputError, match=says):
        engine.submit(wrong)
    drained(engine, found)
    assert found == {"good": alone(request("good"))}


@pytest.mark.parametrize("lead", [-1, 7, 1.5, True])
def test_a_lead_that_the_token_ring_cannot_hold_is_refused(lead):
    with pytest.raises(InputError, match="lead"):
        Engine(model_on("cpu"), 1, lead=lead)


def test_requests_of_one_token_leave_nothing_behind():
    engine = Engine(model_on("cpu"), 2, lead=3)
    for key in range(20):
        engine.submit(request(key, tokens=1, eos=(7, 8), min_new_tokens=1))
    assert len(drained(engine, {})) == 20
    assert engine.running._held_back == [] and engine._by_key == {}


def test_log_probabilities_of_merged_blocks_keep_their_dtype():
    engine, kinds = Engine(model_on("cpu"), 2, lead=1), set()
    for key, wanted in (("a", 2), ("b", 4), ("c", None)):
        engine.submit(request(key, eos=-1, tokens=4 + (wanted or 0), logprobs=wanted))
    while not engine.idle:
        block = engine.step()
        if block.top is not None:
            kinds.add((block.top[0].dtype.name, block.top[1].dtype.name))
    assert kinds == {("int32", "float32")}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [0, 3])
@pytest.mark.parametrize(
    "place", ["prompts.run", "rows.sample_first", "rows.step", "rows.asked", "rows.read"]
)
def test_a_step_that_fails_leaves_no_request_behind(place, lead, device, monkeypatch):
    engine, calls = Engine(model_on(device), 2, lead=lead), iter(range(1000))
    owner, name = place.split(".")
    whole = getattr(getattr(engine, owner), name)

    def broken(*args, **options):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(getattr(engine, owner), name, broken)
    for key in "abc":
        engine.submit(request(key, tokens=8, eos=-1))
    with pytest.raises(KeyboardInterrupt):
        drained(engine, {})
    assert engine.idle
    again = [request(key, tokens=8, eos=-1) for key in "abc"]
    for each in again:
        engine.submit(each)
    found = drained(engine, {})
    assert found == {each.key: alone(each, device) for each in again}


class Racing(dict):
    """Keys of an engine of which a run ends while a request is being submitted."""

    def __init__(self, engine):
        self.engine = engine

    def setdefault(self, key, value):
        found = super().setdefault(key, value)
        engine, self.engine = self.engine, None
        if engine is not None:
            engine._clear()
        return found


def test_a_request_submitted_while_a_run_is_closed():
    engine = Engine(model_on("cpu"), 1)
    engine._by_key = Racing(engine)
    engine.submit(request("late"))
    assert drained(engine, {}) == {"late": alone(request("late"))}
    assert engine._by_key == {}


def test_a_request_submitted_as_a_run_ends_is_not_lost(monkeypatch):
    engine = Engine(model_on("cpu"), 1)
    blocks = engine.blocks([request("first")])
    whole = Engine.idle.fget

    def idle(self):
        found = whole(self)
        if found and not engine._by_key:
            engine.submit(request("late"))  # of another thread
        return found

    with monkeypatch.context() as patched:
        patched.setattr(Engine, "idle", property(idle))
        assert [done.request.key for block in blocks for done in block.finished] == ["first"]
    assert drained(engine, {}) == {"late": alone(request("late"))}


def test_runs_of_one_engine_share_their_tables():
    """Making tables again took as long as a decode step before every first token."""
    engine = Engine(model_on("cpu"), 2)
    expected = [token.id for token in engine.run([request(0)])]
    tables = engine.results.ids
    left = engine.run(request(key) for key in range(5))
    next(left)
    left.close()
    assert [token.id for token in engine.run([request(0)])] == expected
    assert engine.results.ids is tables and not engine.results.alive.any()
