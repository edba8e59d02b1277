"""Whatever is passed to the public API: it works, or the error is one of ours."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Iterator

import numpy as np
import pytest
from builders import TINY, small_bpe, write_bpe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from odd_values import ODD, tried

import gpt2cupy
from gpt2cupy import GPT2, GPT2Config, LanguageModel, SamplingParams
from gpt2cupy.generation.generation_config import GenerationConfig
from gpt2cupy.tokenizer import Tokenizer

CONFIG = GPT2Config(vocab_size=270, n_positions=16, n_embd=8, n_layer=1, n_head=1)
FEW = settings(max_examples=120, suppress_health_check=list(HealthCheck))


numbers = st.one_of(
    st.integers(-5, 300),
    st.sampled_from([2**31, 2**63, 2**64, 10**30, 10**400, -1, True]),
    st.floats(),
    st.sampled_from([np.int64(3), np.float32(0.5), np.uint8(7), np.bool_(True), np.float64("nan")]),
)
texts = st.one_of(st.text(max_size=8), st.sampled_from(["\ud800", "\udcff", "<|endoftext|>", ""]))
scalars = st.one_of(st.none(), numbers, texts, st.binary(max_size=4), st.just({}))
arrays = st.sampled_from(
    [
        np.array([3, 4]), np.array([[3, 4], [5, 6]]), np.array([]), np.array(3), np.zeros((2, 0)),
        np.array([1.5]), np.array(["a"]), np.array([None]), np.array([2**63], np.uint64),
        np.zeros((1, 1, 1), np.int32), np.array([3], object), np.array([[3]], np.int8),
    ]
)  # fmt: skip
lists = st.recursive(
    st.one_of(scalars, arrays), lambda inner: st.lists(inner, max_size=3), max_leaves=6
)
values = st.one_of(
    scalars,
    arrays,
    lists,
    lists.map(lambda x: tuple(x) if isinstance(x, list) else x),
    st.dictionaries(st.sampled_from(["input_ids", "attention_mask"]), lists, max_size=2),
    st.dictionaries(st.integers(-2, 300), numbers, max_size=3),
)
FIELDS = sorted(vars(SamplingParams()))


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    write_bpe(folder, *small_bpe())
    model = GPT2.random(CONFIG, device="cpu")
    with LanguageModel(model, Tokenizer.from_folder(folder), "small") as found:
        yield found


@FEW
@given(prompt=values, name=st.sampled_from(FIELDS), value=values, most=st.integers(0, 2))
def test_generate_and_stream(lm, prompt, name, value, most):
    options = {"max_new_tokens": most} | ({} if name == "n" else {name: value})
    if name == "max_new_tokens" and value is None:
        options = {}
    found = tried(lm.generate, prompt, **options)
    if found is not None:
        assert hash(found) if not isinstance(found, list) else True
        assert found == found
    tried(lambda: list(lm.stream(prompt, **options)))


@FEW
@given(options=st.dictionaries(st.sampled_from([*FIELDS, "other"]), values, max_size=3))
def test_sampling_params(lm, options):
    params = tried(lambda: SamplingParams(**{k: v for k, v in options.items() if k != "other"}))
    if params is not None and params.n < 10:
        tried(lm.generate, "he", params, max_new_tokens=1, min_new_tokens=0)
    tried(lm.stream, "he", None, **options)


@FEW
@given(text=values, window=scalars, stride=scalars, bos=scalars)
def test_score(lm, text, window, stride, bos):
    for options in ({}, {"window": window, "stride": stride}, {"bos": bos}):
        found = tried(lm.score, text, **options)
        for score in found if isinstance(found, list) else [found]:
            if score is not None:
                assert score.perplexity > 0 and score == score and isinstance(hash(score), int)
                tried(score.bits_per_byte, text)


@FEW
@given(ids=values, other=values)
def test_ids(lm, ids, other):
    for call in (lm.encode, lm.decode, lm, lm.hidden_states, lm.model):
        tried(call, ids)
    tried(lm.tokenizer.encode, ids)
    tried(lm.tokenizer.decode, ids)
    tried(lambda: lm.tokenizer.encode("a", allowed_special=other))
    tried(lambda: lm.generate("a", max_batch=other, max_new_tokens=1))
    tried(lambda: lm.generate("a", generation_config=other, max_new_tokens=1))
    tried(lambda: lm.generate("a", other, max_new_tokens=1))


@FEW
@given(
    name=st.sampled_from(["dtype", "device", "revision", "tokenizer", "batch_invariant"])
    | st.sampled_from(["quantize", "generation_config", "name_or_path"]),
    value=scalars.filter(lambda v: v not in ("auto", "cuda", "shakespeare", None, False)),
)
def test_load(name, value):
    tried(gpt2cupy.load, **({"name_or_path": "/nowhere"} | {name: value}))


of_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=6,
)
NAMES = [*TINY.to_dict(), "hidden_size", "add_cross_attention"]


@FEW
@given(fields=st.dictionaries(st.sampled_from(NAMES), of_json), value=values)
def test_config(fields, value):
    tried(GPT2Config.from_dict, fields)
    tried(GPT2Config.from_name, value)
    for name in ("vocab_size", "activation_function", "layer_norm_epsilon", "eos_token_id"):
        tried(lambda name=name: GPT2Config(**{name: value}))


KEYS = ["do_sample", "temperature", "top_k", "eos_token_id", "bos_token_id", "suppress_tokens"]
KEYS += ["bad_words_ids", "stop_strings", "num_beams", "x"]


@FEW
@given(fields=st.dictionaries(st.sampled_from(KEYS), of_json))
def test_generation_config(fields):
    found = tried(GenerationConfig.from_dict, fields, CONFIG)
    if found is not None:
        tried(lambda: SamplingParams(**found.settings))


# What hypothesis meets by luck only: each argument with each kind of value, once.


def arguments(call):
    return [name for name in inspect.signature(call).parameters if name not in ("self", "options")]


@pytest.mark.parametrize("name", FIELDS)
def test_odd_values_of_sampling_params(lm, name):
    for value in ODD:
        if not callable(value):  # a logits_processor's own errors are the caller's
            tried(lm.generate, "he", **{"max_new_tokens": 1, name: value})


@pytest.mark.parametrize("method", ["generate", "stream", "agenerate", "astream", "score", "batch"])
def test_odd_values_of_methods(lm, method, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # odd paths are written there
    call = getattr(lm, method)
    files = {"requests": tmp_path / "in.jsonl", "answers": tmp_path / "out.jsonl"}
    files["requests"].touch()
    first = arguments(call)
    usual = files if method == "batch" else {first[0]: "he"}
    if "params" in first:
        usual["params"] = SamplingParams(max_new_tokens=1)
    for name in first:
        for value in ODD:
            if name == first[0] and (callable(value) or isinstance(value, str)):
                continue
            found = tried(call, **(usual | {name: value}))
            if inspect.iscoroutine(found):
                tried(asyncio.run, found)
            elif inspect.isasyncgen(found):
                tried(asyncio.run, drained(found))
            elif isinstance(found, Iterator):
                tried(list, found)


async def drained(pieces):
    return [piece async for piece in pieces]


@pytest.mark.parametrize("name", arguments(gpt2cupy.load))
def test_odd_values_of_load(name):
    for value in ODD:
        if value is not None or name == "name_or_path":
            tried(gpt2cupy.load, **({"name_or_path": "/nowhere", "device": "cpu"} | {name: value}))


@pytest.mark.parametrize("logprob", [-800.0, -math.inf])
def test_a_perplexity_beyond_any_float_is_infinite(logprob):
    score = gpt2cupy.Score([5, 6], np.full(2, logprob, np.float32))
    assert score.perplexity == math.inf
    assert gpt2cupy.Score([5], np.float32([-1.0])).perplexity == pytest.approx(math.e)
