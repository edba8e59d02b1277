"""A request's own function of the logits: what it is given, what it changes, and whom not."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
from builders import TINY

import gpt2cupy
from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.errors import InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = [
    {},
    {"temperature": 0.9},
    {"temperature": 0.9, "top_k": 7},
    {"repetition_penalty": 1.4, "frequency_penalty": 0.3},
    {"min_new_tokens": 4, "logprobs": 2},
]


@functools.cache
def model_on(device):
    weights = GPT2.random(TINY, 3, device=device).weights
    return GPT2(TINY, weights, batch_invariant=True)


def request(key, processor=None, tokens=9, **options):
    prompt = (np.arange(4) * 7 + 3 * sum(map(ord, str(key)))).astype(np.int32) % TINY.vocab_size
    params = SamplingParams(max_new_tokens=tokens, seed=4, logits_processor=processor, **options)
    return Request(key, prompt, params, eos=-1)


def run(engine, wanted):
    found = {each.key: [] for each in wanted}
    for token in engine.run(wanted):
        found[token.key].append((token.id, token.logprob, token.top))
    return found


def nothing(ids, logits):
    return None


def without_even(ids, logits):
    logits[::2] = -math.inf


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("slots", [1, 3])
def test_one_that_changes_nothing_changes_no_bit(slots, options, device):
    engine = Engine(model_on(device), slots, lead=3)
    plain = [request(key, **options) for key in range(4)]
    processed = [request(key, nothing if key % 2 else None, **options) for key in range(4)]
    assert run(engine, processed) == run(engine, plain)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", KINDS)
def test_it_bans_as_a_bias_does_and_others_feel_nothing(options, device):
    engine = Engine(model_on(device), 3, lead=2)
    banned = dict.fromkeys(range(0, TINY.vocab_size, 2), -math.inf)
    expected = run(engine, [request(key, **options) for key in range(3)])
    biased = run(engine, [request(1, **options, logit_bias=banned)])
    found = run(
        engine, [request(0, **options), request(1, without_even, **options), request(2, **options)]
    )
    assert (found[0], found[2]) == (expected[0], expected[2])
    assert [id_ for id_, *_ in found[1]] == [id_ for id_, *_ in biased[1]]
    assert all(id_ % 2 for id_, *_ in found[1])


@pytest.mark.parametrize("device", DEVICES)
def test_it_gets_the_text_so_far_and_may_return_other_logits(device):
    seen = []

    def next_number(ids, logits):
        seen.append((ids.tolist(), logits.shape, logits.dtype.name))
        other = logits * 0
        other[(int(ids[-1]) + 1) % TINY.vocab_size] = 1
        return other

    wanted = request("count", next_number, tokens=5)
    (found,) = run(Engine(model_on(device), 2, lead=3), [wanted]).values()
    last = int(wanted.prompt[-1])
    text = [(last + step) % TINY.vocab_size for step in range(1, 6)]
    assert [id_ for id_, *_ in found] == text
    prompt = wanted.prompt.tolist()
    rows = [((prompt + text)[: len(prompt) + n], (TINY.vocab_size,), "float32") for n in range(5)]
    assert seen == rows


def test_texts_that_come_and_go_around_it(device="cpu"):
    engine = Engine(model_on(device), 3, lead=3)
    wanted = [
        request(key, without_even if key == 2 else None, tokens=3 + 4 * (key % 3))
        for key in range(8)
    ]
    expected = {}
    for each in wanted:
        expected |= run(engine, [each])
    assert run(engine, wanted) == expected
    assert not engine.running._processed


def test_its_error_ends_the_run_and_leaves_the_engine_usable():
    def broken(ids, logits):
        if len(ids) > 6:
            raise ZeroDivisionError

    engine = Engine(model_on("cpu"), 2, lead=3)
    with pytest.raises(ZeroDivisionError):
        run(engine, [request(0), request(1, broken)])
    assert engine.idle and not engine.running._processed
    assert run(engine, [request(0)]) == run(Engine(model_on("cpu"), 1), [request(0)])


def test_through_generate():
    with gpt2cupy.load("shakespeare", device="cpu") as lm:
        banned = lm.generate("ROMEO:", max_new_tokens=1).tokens[0]

        def other(ids, logits):
            logits[banned] = -math.inf

        done = lm.generate(["ROMEO:", "ROMEO:"], max_new_tokens=12, logits_processor=other)
        assert banned not in done[0].tokens and done[0].tokens == done[1].tokens


def test_what_is_refused():
    with pytest.raises(InputError, match="logits_processor"):
        SamplingParams(logits_processor=3)
    with pytest.raises(InputError, match="exclude each other"):
        SamplingParams(logits_processor=nothing, speculate="ngram")
