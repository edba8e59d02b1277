"""Beginnings that prompts share: found, run once, copied or kept, and with the bits of no reuse."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from builders import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2cupy
from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.errors import InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.prefixes import BLOCK, Prefixes
from gpt2cupy.generation.request import Request
from gpt2cupy.generation.results import tokens_of

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ALL = 2 * BLOCK + 3
SHARED = np.arange(7, 7 + ALL, dtype=np.int32)


@functools.cache
def model_on(device, invariant=True):
    weights = GPT2.random(TINY, 3, device=device).weights
    return GPT2(TINY, weights, batch_invariant=invariant)


def request(key, own=2, shared=ALL, tokens=3, priority=0, **options):
    """A prompt of ``shared`` tokens that others begin with too, and some of its own."""
    rest = (np.arange(own) * 7 + 50 + sum(map(ord, str(key))) % 13).astype(
        np.int32
    ) % TINY.vocab_size
    params = SamplingParams(max_new_tokens=tokens, temperature=1.5, seed=4, **options)
    prompt = np.concatenate([SHARED[:shared], rest]).astype(np.int32)
    return Request(key, prompt, params, eos=-1, priority=priority)


class Counted(Engine):
    """An engine that counts the prompt tokens which it runs."""

    run_tokens = 0

    def _allocate(self, *args):
        super()._allocate(*args)
        whole = self.prompts.run

        def run(tokens, *rest):
            self.run_tokens += sum(map(len, tokens))
            return whole(tokens, *rest)

        self.prompts.run = run


def results(engine, requests):
    found = {}
    for block in engine.blocks(requests):
        for token in tokens_of(block):
            found.setdefault(token.key, []).append((token.id, token.logprob))
    return found


@functools.cache
def single(device):
    return Engine(model_on(device), 1)


def alone(device, requests):
    found = {}
    for each in requests:
        found |= results(single(device), [each])
    return found


# -- the trie --------------------------------------------------------------------------------------

PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=4).flatmap(
    lambda blocks: st.tuples(st.just(blocks), st.integers(0, BLOCK))
)


def ids_of(drawn):
    blocks, rest = drawn
    return np.array([*np.repeat(blocks, BLOCK), *[5] * rest], np.int32)


def common(a, b):
    limit = min(len(a), len(b))
    differ = np.flatnonzero(a[:limit] != b[:limit])
    return int(differ[0]) if len(differ) else limit


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("enter"), st.integers(0, 3), PROMPTS),
            st.tuples(st.just("cut"), st.integers(0, 3), st.integers(0, 70)),
            st.tuples(st.just("extend"), st.integers(0, 3), PROMPTS),
        ),
        max_size=12,
    ),
    PROMPTS,
)
def test_the_longest_shared_beginning_is_found(events, prompt):
    prefixes, held = Prefixes(4), {slot: np.zeros(0, np.int32) for slot in range(4)}
    for kind, slot, what in events:
        if kind == "enter":
            held[slot] = ids_of(what)
            prefixes.enter(slot, held[slot], len(held[slot]), slot)
        elif kind == "cut":
            held[slot] = held[slot][:what]
            prefixes.cut(slot, what)
        elif prefixes.owner(slot) == slot:
            held[slot] = np.concatenate([held[slot], ids_of(what)])
            prefixes.extend(slot, slot, ids_of(what))
    wanted = ids_of(prompt)
    slot, shared = prefixes.find(wanted)
    blocks = max(common(wanted, ids) // BLOCK for ids in held.values())
    if not blocks:
        assert (slot, shared) == (-1, 0)
        return
    # Of slots that share as many blocks any.
    assert shared == min(common(wanted, held[slot]), len(wanted) - 1)
    assert common(wanted, held[slot]) // BLOCK == blocks
    assert prefixes.written == [len(ids) for ids in held.values()]


def test_nothing_is_left_of_slots_that_were_cut():
    prefixes = Prefixes(2)
    for _ in range(3):
        prefixes.enter(0, ids_of(([1, 0, 1], 3)), 0, "a")
        prefixes.enter(1, ids_of(([1, 1], 0)), 0, "b")
        prefixes.cut(0, 0)
        prefixes.cut(1, 5)
    assert prefixes._root.children == {}


def test_a_slot_that_is_anothers_by_now_is_not_extended():
    prefixes = Prefixes(1)
    prefixes.enter(0, ids_of(([1], 0)), BLOCK, "first")
    prefixes.enter(0, ids_of(([0], 0)), BLOCK, "second")
    prefixes.extend(0, "first", ids_of(([1], 0)))
    assert prefixes.find(ids_of(([0, 1], 0))) == (0, BLOCK)


# -- one run ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [1, 2, 8])
def test_what_a_list_shares_runs_once(slots, device):
    engine = Counted(model_on(device), slots)
    wanted = [request(key, own=1 + key % 3) for key in range(8)]
    assert results(engine, wanted) == alone(device, wanted)
    own = sum(1 + key % 3 for key in range(8))
    assert engine.run_tokens == ALL + own
    assert engine.prefixes.hits == 7 * ALL
    assert engine.prefixes.queries == 8 * ALL + own


@pytest.mark.parametrize("device", DEVICES)
def test_continuations_of_one_prompt_run_it_once(device):
    engine = Counted(model_on(device), 4)
    base = request("n", own=0, n=4)
    wanted = [Request(i, base.prompt, base.params, index=i, eos=-1) for i in range(4)]
    assert results(engine, wanted) == alone(device, wanted)
    assert engine.run_tokens == ALL + 3, "the last token gives each its logits"


def test_a_prompt_waits_for_the_pieces_of_the_one_that_it_begins_like():
    engine = Counted(model_on("cpu"), 3)
    engine.scheduler.budget = 9
    wanted = [request(0, own=5), request(1, own=4), request(2, shared=BLOCK)]
    assert results(engine, wanted) == alone("cpu", wanted)
    # The third has from the first as soon as it has run: it need not wait for all of it.
    assert engine.run_tokens == ALL + 5 + 4 + 2


def test_who_waits_for_a_prompt_lends_it_its_priority():
    engine = Counted(model_on("cpu"), 8)
    engine.scheduler.budget = 8
    engine.submit(request("late", own=3, priority=5))
    engine.step()
    engine.submit(request("soon", own=4, priority=0))
    others = [request(i, own=12, shared=0, priority=3) for i in range(4)]
    for each in others:
        engine.submit(each)
    order = []
    while not engine.idle:
        order += [key for key in engine.step().keys if key not in order]
    assert order[0] in ("late", "soon") and set(order[:2]) == {"late", "soon"}
    assert engine.run_tokens == ALL + 3 + 4 + 4 * 12


def test_a_cancelled_prompt_leaves_what_it_has_run():
    engine = Counted(model_on("cpu"), 2)
    engine.scheduler.budget = 20
    engine.submit(request("first", own=9))
    engine.submit(request("second"))
    engine.step()
    engine.cancel("first")
    found = {}
    while not engine.idle:
        for token in tokens_of(engine.step()):
            found.setdefault(token.key, []).append((token.id, token.logprob))
    assert found == alone("cpu", [request("second")])
    assert engine.run_tokens == ALL + 2


@pytest.mark.parametrize("device", DEVICES)
def test_without_batch_invariance_results_agree_within_rounding(device):
    model = model_on(device, invariant=False)
    greedy = SamplingParams(max_new_tokens=3)
    wanted = [Request(key, request(key, own=2 + key).prompt, greedy, eos=-1) for key in range(3)]
    together = results(Engine(model, 3), wanted)
    for each in wanted:
        single_run = results(Engine(model, 1), [each])[each.key]
        assert [id_ for id_, _ in single_run] == [id_ for id_, _ in together[each.key]]
        np.testing.assert_allclose(
            [p for _, p in single_run], [p for _, p in together[each.key]], rtol=1e-4
        )


# -- across runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_run_begins_anew_unless_asked(device):
    for keeps in (False, True):
        engine = Counted(model_on(device), 2, prefix_cache=keeps)
        first, second = request("a", own=4), request("b", own=3)
        assert results(engine, [first]) == alone(device, [first])
        assert results(engine, [second]) == alone(device, [second])
        assert engine.run_tokens == ALL + 4 + (0 if keeps else ALL) + 3


def test_an_idle_engine_that_is_driven_by_hand_forgets():
    for keeps in (False, True):
        engine = Counted(model_on("cpu"), 2, prefix_cache=keeps)
        for key in "ab":
            engine.submit(request(key))
            while not engine.idle:
                engine.step()
        assert engine.prefixes.hits == (ALL if keeps else 0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("invariant", [False, True])
def test_a_dialogue_runs_only_what_is_new(invariant, device):
    engine = Counted(model_on(device, invariant), 2, prefix_cache=True)
    first = request("a", tokens=6)
    reply = [id_ for id_, _ in results(engine, [first])["a"]]
    turn = np.concatenate([first.prompt, np.array([*reply, 3, 1], np.int32)])
    before = engine.run_tokens
    results(engine, [Request("b", turn, SamplingParams(max_new_tokens=3), eos=-1)])
    # Of the reply all but its last token was fed; with batch_invariant only prompts are taken.
    assert engine.run_tokens - before == (2 + 6 if invariant else 2 + 1)


def test_the_slot_used_least_recently_is_given_away():
    engine = Counted(model_on("cpu"), 2, prefix_cache=True)
    a, b = request("a"), request("b", shared=0, own=30)
    for each in (a, b, a, request("c", shared=0, own=20)):
        results(engine, [each])
    before = engine.run_tokens
    results(engine, [a])
    assert engine.run_tokens - before == 1, "its slot was used after that of b"


@pytest.mark.parametrize("device", DEVICES)
def test_a_failed_step_leaves_nothing_to_reuse(device, monkeypatch):
    engine = Counted(model_on(device), 2, prefix_cache=True)
    with monkeypatch.context() as patched:
        patched.setattr(engine.rows, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            results(engine, [request("a")])
    before = engine.run_tokens
    assert results(engine, [request("b")]) == alone(device, [request("b")])
    assert engine.run_tokens - before == ALL + 2


def test_load_takes_the_option():
    with gpt2cupy.load("shakespeare", device="cpu", prefix_cache=True) as lm:
        text = "ROMEO: O, she doth teach the torches to burn bright! It seems she hangs upon "
        first = lm.generate(text, max_new_tokens=4)
        again = lm.generate(text, max_new_tokens=4)
        assert again.tokens == first.tokens
        assert lm._session._engine.prefixes.hits == first.prompt_tokens - 1
    with pytest.raises(InputError, match="prefix_cache"):
        gpt2cupy.load("shakespeare", device="cpu", prefix_cache=1)


@pytest.mark.parametrize("wrong", [None, 1, "yes"])
def test_prefix_cache_is_true_or_false(wrong):
    with pytest.raises(InputError, match="prefix_cache"):
        Engine(model_on("cpu"), 1, prefix_cache=wrong)


# -- random arrivals -------------------------------------------------------------------------------

EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, ALL), st.integers(1, 6)),
        st.tuples(st.just("cancel"), st.integers(0, 12), st.none()),
        st.tuples(st.just("step"), st.integers(1, 5), st.none()),
        st.tuples(st.just("fail"), st.integers(0, 4), st.none()),
    ),
    max_size=25,
)
# Where a step may fail, half of it done.
PLACES = ("prompts.copy", "prompts.run", "plain.sample_first", "plain.step", "plain.read")


def fail_at(engine, place):
    """Let a step fail at a place, if it comes there; its block if it did not."""
    owner, name = place.split(".")
    thing = getattr(engine.running, owner)
    whole = getattr(thing, name)

    def broken(*args, **options):
        whole(*args, **options)
        raise KeyboardInterrupt

    setattr(thing, name, broken)
    try:
        return engine.step()
    except KeyboardInterrupt:
        return None
    finally:
        delattr(thing, name)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=40, deadline=None)
@given(EVENTS, st.integers(1, 5), st.integers(0, 3), st.integers(1, 40), st.booleans())
def test_reuse_changes_no_bit_of_a_batch_invariant_engine(
    device, events, slots, lead, budget, keeps
):
    engine = Engine(model_on(device), slots, lead=lead, prefix_cache=keeps)
    engine.scheduler.budget = budget
    found, wanted, cancelled, over = {}, {}, set(), set()

    def take(block):
        for token in tokens_of(block):
            found.setdefault(token.key, []).append((token.id, token.logprob))
        over.update(done.request.key for done in block.finished)

    for kind, number, tokens in events:
        if kind == "submit":
            key = len(wanted)
            wanted[key] = request(key, shared=number, own=1 + key % 3, tokens=tokens)
            engine.submit(wanted[key])
        elif kind == "cancel":
            engine.cancel(number)
            cancelled |= {number} & wanted.keys()
        elif kind == "step":
            for _ in range(number):
                take(engine.step())
        elif (block := fail_at(engine, PLACES[number])) is not None:
            take(block)
        else:  # it ends all that were there
            assert engine.idle
            cancelled |= wanted.keys() - over
    while not engine.idle:
        take(engine.step())
    for key, each in wanted.items():
        expected, got = alone(device, [each])[key], found.get(key, [])
        assert got == (expected[: len(got)] if key in cancelled else expected)
    assert engine.cache.lengths.tolist() == [0] * slots
