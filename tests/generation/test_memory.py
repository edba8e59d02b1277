"""Requests leave memory where it was, however they end."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest
from builders import TINY

from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.errors import InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request

ROUNDS = 4
MOST_OBJECTS, MOST_BYTES = 40, 32 << 10  # that may be more: the interpreter's own


def mixed(number: int, slots: int) -> Request:
    """Requests of many kinds, keys that are never the same again, and beginnings that are."""
    rng = np.random.default_rng(number % 40)
    kinds = [{}, {"temperature": 0.9, "top_k": 5}, {"logprobs": 3}, {"min_new_tokens": 3}]
    kinds += [{"presence_penalty": 0.5}, {"logit_bias": {5: 1.0}}, {"stop_token_ids": [7, 9]}]
    options = kinds[number % len(kinds)]
    if slots == 1 and number % 2 and "presence_penalty" not in options:
        options = options | {"speculate": "ngram"}
    prompt = np.concatenate([np.arange(20), rng.integers(0, TINY.vocab_size, 1 + number % 9)])
    params = SamplingParams(
        max_new_tokens=options.get("min_new_tokens", 1) + number % 11, seed=number, **options
    )
    return Request(("key", number), prompt.astype(np.int32), params, eos=(3, 4))


def serve(engine: Engine, first: int) -> None:
    """Some requests: run to their ends, cancelled in each state, refused, and left by a run."""
    wanted = [mixed(first + i, engine.slots) for i in range(6)]
    for each in wanted:
        engine.submit(each)
    with pytest.raises(InputError):
        engine.submit(Request(("long", first), np.zeros(60, np.int32), wanted[0].params))
    engine.cancel(wanted[5].key)
    for turn in range(12):
        engine.step()
        if turn == 2:
            engine.cancel(wanted[first % 5].key)
    while not engine.idle:
        engine.step()
    left = engine.blocks([mixed(first + i, engine.slots) for i in range(3)])
    next(left)
    left.close()


@pytest.mark.parametrize(("slots", "keeps"), [(1, True), (3, False), (3, True)])
def test_nothing_grows_with_the_number_of_requests(slots, keeps):
    engine = Engine(GPT2.random(TINY, 0, device="cpu"), slots, lead=3, prefix_cache=keeps)
    for number in range(0, 9 * ROUNDS, 9):
        serve(engine, number)
    gc.collect()
    tracemalloc.start()
    try:
        found = []
        for start in (1000, 10000):
            for number in range(start, start + 9 * ROUNDS, 9):
                serve(engine, number)
            gc.collect()
            found.append((len(gc.get_objects()), tracemalloc.get_traced_memory()[0]))
    finally:
        tracemalloc.stop()
    (objects, size), (later_objects, later_size) = found
    assert later_objects - objects <= MOST_OBJECTS
    assert later_size - size <= MOST_BYTES
