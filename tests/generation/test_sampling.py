"""What sampling settings do to whole texts: counts and biases, ends, and neighbours in a batch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import TINY, write_checkpoint

from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.ops.reference_sampling import token_logprobs
from gpt2cupy.weights import Weights

PROMPT = np.array([5, 9, 5, 30], np.int32)


@pytest.fixture
def model(xp, tmp_path):
    weights = Weights.random(TINY, 0)
    weights.wte[...] *= 8
    write_checkpoint(tmp_path, TINY, weights=weights)
    return GPT2.from_pretrained(str(tmp_path), device="cpu" if xp is np else "cuda")


def run(engine, params, eos=-1):
    return list(engine.run([Request(0, PROMPT, params, eos=eos)]))


@pytest.mark.parametrize(
    "options, counted, biased",
    [
        ({}, False, False),
        ({"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1}, False, False),
        ({"presence_penalty": 0.1}, True, False),
        ({"frequency_penalty": 0.1}, True, False),
        ({"repetition_penalty": 1.1}, True, False),
        ({"logit_bias": {3: 1.0}}, False, True),
    ],
    ids=str,
)
def test_counts_and_biases_take_memory_only_where_asked_for(model, options, counted, biased):
    engine = Engine(model)
    run(engine, SamplingParams(max_new_tokens=2, **options))
    assert (engine.state.counts is not None, engine.state.bias is not None) == (counted, biased)


def test_requests_with_other_settings_are_no_neighbours(model):
    """Also not in time: a row's counts and bias end with the request."""
    options = [
        {"presence_penalty": 9.0},
        {},
        {"repetition_penalty": 3.0, "temperature": 0.8},
        {"logit_bias": {7: 50.0}},
        {"temperature": 1.0, "top_k": 9},
        {"frequency_penalty": 1.5, "min_new_tokens": 5},
        {},
    ]
    requests = [
        Request(i, PROMPT[: 1 + i % 4], SamplingParams(max_new_tokens=9, seed=4, **o), eos=30)
        for i, o in enumerate(options)
    ]
    together: dict = {request.key: [] for request in requests}
    for token in Engine(model, 2).run(requests):
        together[token.key].append(token.id)
    for request in requests:
        alone = [token.id for token in Engine(model).run([request])]
        assert together[request.key] == alone, request.params
    assert together[3] == [7] * 9 and len(set(together[0])) == 9


def test_the_prompt_counts_for_repetition_only(model):
    """A token that wins by far: only the repetition penalty hears that the prompt has it."""
    bias = {5: 1000.0, 6: 900.0}
    for name, value, first in [
        ("presence_penalty", 500.0, 5),
        ("frequency_penalty", 500.0, 5),
        ("repetition_penalty", 2.0, 6),
    ]:
        params = SamplingParams(max_new_tokens=2, logit_bias=bias, **{name: value})
        assert [token.id for token in run(Engine(model), params)] == [first, 11 - first], name


@pytest.mark.parametrize("least", [0, 1, 4])
def test_the_end_cannot_come_before_min_new_tokens(model, least):
    params = SamplingParams(max_new_tokens=9, min_new_tokens=least, logit_bias={30: 1000.0})
    tokens = run(Engine(model), params, eos=30)
    assert [token.finish_reason for token in tokens] == [None] * least + ["eos"]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 2.0, "top_k": 3, "seed": 1},
        {"repetition_penalty": 4.0, "logit_bias": {7: 5.0, 9: -5.0}},
        {"presence_penalty": 3.0, "temperature": 0.5, "min_p": 0.3, "seed": 1},
    ],
    ids=str,
)
def test_logprobs_are_those_of_the_raw_logits(model, options):
    params = SamplingParams(max_new_tokens=8, logprobs=3, **options)
    tokens = run(Engine(model), params)
    ids = [*PROMPT, *(token.id for token in tokens)]
    logits = model(np.array([ids[:-1]]))[0, len(PROMPT) - 1 :]
    logits = logits if isinstance(logits, np.ndarray) else logits.get()
    exact = token_logprobs(logits.astype(np.float64))
    for token, line in zip(tokens, exact, strict=True):
        assert abs(token.logprob - line[token.id]) < 1e-4
        assert [id_ for id_, _ in token.top] == line.argsort()[::-1][:3].tolist()
        np.testing.assert_allclose([p for _, p in token.top], np.sort(line)[::-1][:3], atol=1e-4)


def test_the_seed_decides_the_text(model):
    params = SamplingParams(max_new_tokens=12, temperature=1.0, seed=6)
    texts = [
        tuple(token.id for token in run(Engine(model), dataclasses.replace(params, seed=seed)))
        for seed in (6, 6, 7, 2**32 + 6, 2**63)
    ]
    assert texts[0] == texts[1] and len(set(texts)) == 4
