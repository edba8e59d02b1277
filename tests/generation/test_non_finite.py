"""Logits that are not finite are an error of their request, and of no other."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
from builders import copied, small_bpe, write_bpe, write_checkpoint
from command import call

import gpt2cupy
from gpt2cupy import GPT2Config
from gpt2cupy.errors import NonFiniteError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.sampling import SamplingParams
from gpt2cupy.weights import Weights

CONFIG = GPT2Config(
    vocab_size=263, n_positions=64, n_embd=32, n_layer=2, n_head=2, tie_word_embeddings=False
)
GOOD, BAD = "he", "q"  # the embedding of the byte q overflows
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# What the kernel for a temperature alone chooses, and the other one.
SETTINGS = [{}, {"temperature": 0.8, "seed": 1}, {"presence_penalty": 0.1}]


def write(folder, change, dtype=np.float32, config=CONFIG):
    vocab, merges = small_bpe()
    write_bpe(folder, vocab, merges)
    weights = copied(config, Weights.random(config, 0))
    change(weights, vocab)
    write_checkpoint(folder, config, weights=weights, dtype=dtype)
    return folder


def one_bad_token(weights, vocab):
    weights.wte[vocab[BAD]] = 3e38  # the sum over its channels overflows
    weights.lm_head[vocab[BAD]] = 0  # and nothing but a bias makes it the best


def large_mlp(weights, vocab):
    """Finite, and too large: as in the issue, a layer's MLP times 1e20."""
    for name in ("fc_w", "fc_b", "out_w", "out_b"):
        getattr(weights, name)[1] *= np.float32(1e20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("bad"), one_bad_token)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def lm(folder, device):
    with gpt2cupy.load(str(folder), device=device) as model:
        yield model


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_generate_and_stream_say_so(lm, settings):
    with pytest.raises(NonFiniteError, match="logits are not finite") as caught:
        lm.generate(BAD, max_new_tokens=5, **settings)
    assert caught.value.failed == ((0, 0),) and caught.value.completions is None
    assert "weights overflow" in caught.value.remedy
    with pytest.raises(NonFiniteError, match="new token 1"):
        list(lm.stream(BAD, max_new_tokens=5, **settings))
    # The engine goes on, over the cache in which the bad request left NaN.
    assert lm.generate(GOOD, max_new_tokens=5, **settings).tokens


def test_score_says_so(lm):
    with pytest.raises(NonFiniteError, match=r"not finite \(score\)"):
        lm.score(GOOD + BAD + GOOD)
    with pytest.raises(NonFiniteError):
        lm.score(GOOD * 20 + BAD + GOOD * 20, window=8, stride=2)
    assert np.isfinite(lm.score(GOOD).logprobs).all()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("max_batch", [1, 2, 8])
def test_a_list_finishes_its_other_prompts(lm, max_batch, settings):
    prompts = [GOOD, BAD, "the aaaa", BAD + GOOD, "a"]
    options = {"max_new_tokens": 6, **settings}
    with pytest.raises(NonFiniteError, match="prompt 1, 'q'") as caught:
        lm.generate(prompts, max_batch=max_batch, **options)
    found = caught.value.completions
    assert caught.value.failed == ((1, 0), (3, 0)) and len(found) == 5
    for index in (0, 2, 4):
        assert found[index].tokens == lm.generate(prompts[index], **options).tokens
    assert found[1] is found[3] is None


def test_continuations_of_a_bad_prompt(lm):
    with pytest.raises(NonFiniteError, match="continuation 0") as caught:
        lm.generate([BAD, GOOD], n=2, temperature=1.0, seed=1, max_new_tokens=3)
    bad, good = caught.value.completions
    assert bad == [None, None] and len(good) == 2 and len(good[0].tokens) == 3
    assert caught.value.failed == ((0, 0), (0, 1))


def test_it_may_come_in_the_middle_of_a_text(lm, folder):
    bad = lm.tokenizer.encode(BAD)[0]
    options = {"max_new_tokens": 5, "logit_bias": {bad: 1e4}}
    pieces = lm.stream(GOOD, **options)
    assert next(pieces).token == bad
    with pytest.raises(NonFiniteError, match="new token 2"):
        next(pieces)
    with pytest.raises(NonFiniteError):
        lm.generate([GOOD], **options)


@pytest.mark.parametrize("decode", ["eager", "graph", "persistent"])
@pytest.mark.gpu
def test_every_decode_path_marks_it(tmp_path, decode):
    config = dataclasses.replace(CONFIG, n_embd=256, n_head=4)  # sizes of the persistent step
    folder = write(tmp_path, one_bad_token, config=config)
    with gpt2cupy.load(str(folder), device="cuda", dtype="bfloat16") as lm:
        engine = Engine(lm.model, 1, decode=decode)
        bad = lm.tokenizer.encode(BAD)[0]
        params = SamplingParams(max_new_tokens=4, logit_bias={bad: 1e4})
        tokens = list(engine.run([Request(0, lm.encode(GOOD), params)]))
        assert [token.finish_reason for token in tokens] == [None, "error"]


@pytest.mark.gpu
def test_float16_overflow_names_the_remedy(tmp_path):
    def large(weights, vocab):
        weights.fc_w[1] *= np.float32(5e5)  # each fits float16, their sums do not

    with (
        gpt2cupy.load(str(write(tmp_path, large)), device="cuda", dtype="float16") as lm,
        pytest.raises(NonFiniteError, match="float16 ends at 65504"),
    ):
        lm.generate(GOOD)


def test_a_large_mlp_no_longer_ends_the_text_as_if_it_were_finished(tmp_path):
    path = str(write(tmp_path, large_mlp))
    with gpt2cupy.load(path, device="cpu") as lm, pytest.raises(NonFiniteError):
        lm.generate(GOOD)
    for command in (
        ["generate", GOOD, "--json"],
        ["generate", GOOD],
        ["score", GOOD * 3, "--json"],
    ):
        code, out, err = call(*command, "--model", path, "--device", "cpu")
        assert code == 1 and "logits are not finite" in err
        assert "NaN" not in out and "Infinity" not in out


def test_the_command_writes_what_was_finished(folder):
    flags = ("--model", str(folder), "--device", "cpu", "--max-new-tokens", "3")
    sampled = (*flags, "--temperature", "30", "--seed", "4", "--n", "12")
    code, out, err = call("generate", GOOD, *sampled, "--logit-bias", "80=150")
    assert code == 1 and "logits are not finite" in err
    assert 0 < out.count(GOOD) < 12
    code, out, err = call("generate", GOOD, "--json", *sampled, "--logit-bias", "80=150")
    assert code == 1 and 0 < len(out.splitlines()) < 12
    assert all(math.isfinite(json.loads(line)["index"]) for line in out.splitlines())


def test_logits_of_minus_infinity_beside_numbers_are_fine():
    """Only a row without a number is an error; a token that cannot come is none."""
    from gpt2cupy.ops.reference_sampling import token_logprobs

    line = np.array([[-np.inf, 1.0, -np.inf, 0.0]], np.float32)
    assert not np.isnan(token_logprobs(line)).any()
