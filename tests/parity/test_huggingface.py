"""Ours on NumPy against Hugging Face transformers on the CPU, both in float32."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import widened, write_checkpoint
from error_rule import DTYPES, errors, one_ulp

import gpt2cupy
from gpt2cupy import GPT2, GPT2Config
from gpt2cupy.checkpoint.resolve import EMBEDDED
from gpt2cupy.loading import resolve_dtype
from gpt2cupy.weights import Weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.parity

SMALL = GPT2Config(
    vocab_size=503, n_positions=64, n_embd=128, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
)
GPT2_SHAPE = GPT2Config.from_name("gpt2")


def hugging_face(folder, **options):
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32, **options)
    return model.eval()


def their_logits(model, ids):
    with torch.inference_mode():
        return model(torch.tensor(np.asarray(ids))).logits.numpy()


def assert_logits_agree(ours, theirs):
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


VARIANTS = {
    "plain": {},
    "gelu": {"activation_function": "gelu"},
    "gelu_pytorch_tanh": {"activation_function": "gelu_pytorch_tanh"},
    "relu": {"activation_function": "relu"},
    "silu": {"activation_function": "silu"},
    "tanh": {"activation_function": "tanh"},
    "n_inner": {"n_inner": 200},
    "epsilon": {"layer_norm_epsilon": 1e-3},
    "no scale": {"scale_attn_weights": False},
    "inverse layer": {"scale_attn_by_inverse_layer_idx": True},
    "upcast": {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
    "untied": {"tie_word_embeddings": False},
    "head size 1": {"n_embd": 4, "n_head": 4},
    "head size 8": {"n_embd": 32, "n_head": 4},
    "head size 59": {"n_embd": 118, "n_head": 2},
    "head size 160": {"n_embd": 320, "n_head": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_variant(tmp_path, variant):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    write_checkpoint(tmp_path, config, seed=1)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2, 40))
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu")(ids)
    assert_logits_agree(ours, their_logits(hugging_face(tmp_path), ids))


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("prefix", [True, False])
def test_logits_of_every_stored_dtype(tmp_path, stored, prefix):
    write_checkpoint(tmp_path, SMALL, 2, DTYPES[stored], prefix=prefix)
    ids = np.random.default_rng(0).integers(0, SMALL.vocab_size, (1, 30))
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu")(ids)
    assert_logits_agree(ours, their_logits(hugging_face(tmp_path), ids))


def test_logits_of_gpt2s_shape(tmp_path):
    write_checkpoint(tmp_path, GPT2_SHAPE, seed=3)
    ids = np.random.default_rng(0).integers(0, GPT2_SHAPE.vocab_size, (1, 64))
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu")(ids)
    assert_logits_agree(ours, their_logits(hugging_face(tmp_path), ids))


def near_tie(exact, baseline):
    """Whether the two best of a step's logits are closer than the error rule allows errors."""
    second, best = np.sort(exact)[-2:]
    allowed = 2 * errors(baseline, exact)[0] + one_ulp(np.abs(exact).max(), np.dtype(np.float32))
    return best - second <= 2 * allowed


def assert_same_text(ours, theirs, prompt, oracle, model):
    for step, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own != other:
            ids = np.array([[*prompt, *ours[:step]]])
            exact, baseline = oracle(ids)[0, -1], their_logits(model, ids)[0, -1]
            assert near_tie(exact, baseline), f"step {step}: {own} against {other}"
            return


def their_text(model, prompt, count):
    with torch.inference_mode():
        out = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
        )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("prompt", ["ROMEO:", "", "First Citizen:\nBefore we proceed"])
def test_greedy_text_of_the_embedded_model(prompt):
    lm = gpt2cupy.load(device="cpu")
    ids = lm.encode(prompt).tolist()
    ours = lm.generate(prompt, max_new_tokens=200, min_new_tokens=200).tokens
    model = hugging_face(EMBEDDED["shakespeare"])
    oracle = GPT2(lm.config, widened(lm.config, lm.model.weights))
    assert len(ours) == 200
    assert_same_text(ours, their_text(model, ids, 200), ids, oracle, model)


def test_greedy_text_of_gpt2s_shape(tmp_path):
    weights = write_checkpoint(tmp_path, GPT2_SHAPE, seed=4)
    prompt = [15496, 11, 995]
    model = hugging_face(tmp_path)
    theirs = their_text(model, prompt, 200)
    from gpt2cupy import SamplingParams
    from gpt2cupy.engine import Engine, Request

    params = SamplingParams(max_new_tokens=200)
    request = Request(0, np.array(prompt, np.int32), params)
    ours = [token.id for token in Engine(GPT2(GPT2_SHAPE, weights)).run([request])]
    oracle = GPT2(GPT2_SHAPE, widened(GPT2_SHAPE, weights))
    assert_same_text(ours, theirs, prompt, oracle, model)


def test_rms_error_is_at_most_a_tenth_above_theirs(tmp_path):
    """Median over 20 seeds of our RMS error over theirs, both against float64."""
    config = dataclasses.replace(SMALL, n_embd=256, n_layer=4, n_head=4)
    ratios = []
    for seed in range(20):
        weights = write_checkpoint(tmp_path, config, seed)
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, (1, 64))
        exact = GPT2(config, widened(config, weights))(ids)
        ours = GPT2(config, weights)(ids)
        theirs = their_logits(hugging_face(tmp_path), ids)
        ratios.append(errors(ours, exact)[1] / errors(theirs, exact)[1])
    print(f"median ratio {np.median(ratios):.3f}")
    assert np.median(ratios) <= 1.1


def test_the_embedded_model_and_its_tokenizer_load_in_transformers():
    lm = gpt2cupy.load(device="cpu")
    folder = EMBEDDED["shakespeare"]
    theirs = transformers.GPT2TokenizerFast.from_pretrained(folder)
    for text in ("To be, or not to be", "  spaces   and\n\nlines", "naïve 🙂 漢字"):
        ids = lm.tokenizer.encode(text)
        assert ids == theirs(text)["input_ids"]
        assert lm.tokenizer.decode(ids) == text
    ids = np.array([lm.encode("JULIET:\nO Romeo")])
    assert_logits_agree(lm(ids), their_logits(hugging_face(folder), ids))


def test_score_equals_theirs_on_the_same_windows():
    lm = gpt2cupy.load(device="cpu")
    text = "Friends, Romans, countrymen, lend me your ears; I come to bury Caesar. " * 12
    window, stride = 64, 24
    ours = lm.score(text, window=window, stride=stride)
    model = hugging_face(EMBEDDED["shakespeare"])
    ids = [lm.tokenizer.eot_token, *lm.tokenizer.encode(text)]
    expected, done = [], 1
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids) - 1)
        logprobs = torch.log_softmax(
            torch.tensor(their_logits(model, [ids[start:end]])[0]).double(), -1
        )
        new = range(done, end + 1)
        expected += [float(logprobs[i - start - 1, ids[i]]) for i in new]
        done = end + 1
        if done >= len(ids):
            break
    np.testing.assert_allclose(ours.logprobs, expected, atol=1e-4)
    assert ours.tokens == ids[1:]
    assert ours.perplexity == pytest.approx(np.exp(-np.mean(expected)), rel=1e-5)


def test_the_cpu_says_it_holds_float32():
    assert resolve_dtype("float16", np.dtype(np.float16), "cpu") == np.float32
    assert Weights.random(SMALL, 0).dtype == np.float32
