"""What is captured before the first request, and that nothing is captured between steps."""

from __future__ import annotations

import numpy as np
import pytest
from builders import TINY

from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.decode import captured, prompt
from gpt2cupy.decode.prompt import BUCKETS, shapes
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.server.warm import warm_up


def requests():
    rng = np.random.default_rng(0)
    kinds = (
        SamplingParams(max_new_tokens=6),
        SamplingParams(max_new_tokens=9, temperature=1, top_k=5, seed=3),
        SamplingParams(max_new_tokens=4, temperature=0.7, seed=1),
        SamplingParams(max_new_tokens=5, repetition_penalty=1.3),
        SamplingParams(max_new_tokens=5, logit_bias={7: 2.0}),
    )
    for number in range(24):
        ids = rng.integers(0, TINY.vocab_size, int(rng.integers(1, 30))).astype(np.int32)
        yield Request(number, ids, kinds[number % len(kinds)], eos=-1)


def texts(engine):
    return {
        done.request.key: done.ids.tolist()
        for block in engine.blocks(requests())
        for done in block.finished
    }


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("slots", [1, 6])
def test_nothing_is_captured_once_it_is_warm(monkeypatch, device, slots):
    model = GPT2(TINY, GPT2.random(TINY, 3, device=device).weights, batch_invariant=True)
    expected = texts(Engine(model, slots))
    engine = Engine(model, slots)
    graphs = warm_up(engine)
    assert (graphs > 0) == (device == "cuda")

    def refused(*_):
        raise AssertionError("a capture between steps")

    monkeypatch.setattr(prompt, "captured", refused)
    for each in engine.rows.decoders.values():
        assert each.replay is not captured or device == "cpu"
    assert texts(engine) == expected


def test_usual_shapes_are_known_before():
    found = shapes(1024, 256)
    assert {shape.rows for shape in found if shape.sequences == 1} == set(BUCKETS)
    assert len(found) == len(set(found)) < 100
    for shape in found:
        assert shape.sequences <= shape.rows and shape.longest <= shape.rows
    assert all(shape.sequences == 1 for shape in shapes(1024, 1))
