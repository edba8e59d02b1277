"""Logits and ids against transformers in float32 on the CPU."""

from __future__ import annotations

import dataclasses
from statistics import median

import numpy as np
import pytest
from builders import widened, write_checkpoint
from error_rule import DTYPES, errors

from gpt2cupy import GPT2, GPT2Config, ops
from gpt2cupy.config import ACTIVATIONS
from gpt2cupy.weights import Weights

torch = pytest.importorskip("torch", reason="parity needs torch and transformers")
transformers = pytest.importorskip("transformers", reason="parity needs torch and transformers")
pytestmark = pytest.mark.parity

SMALL = GPT2Config(
    vocab_size=301, n_positions=64, n_embd=32, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0
)
MIDDLE = GPT2Config(vocab_size=1000, n_positions=64, n_embd=256, n_layer=4, n_head=4)


def heads(size: int, count: int) -> dict[str, int]:
    return {"n_head": count, "n_embd": size * count}


VARIANTS: dict[str, dict] = {
    "default": {},
    **{name: {"activation_function": name} for name in ACTIVATIONS},
    "narrow inner": {"n_inner": 24},
    "odd inner": {"n_inner": 77},
    "large epsilon": {"layer_norm_epsilon": 1e-2},
    "small epsilon": {"layer_norm_epsilon": 1e-12},
    "no scale": {"scale_attn_weights": False},
    "inverse layer scale": {"scale_attn_by_inverse_layer_idx": True},
    "both scales off and on": {
        "scale_attn_weights": False,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "upcast": {"reorder_and_upcast_attn": True},
    "upcast and inverse": {
        "reorder_and_upcast_attn": True,
        "scale_attn_by_inverse_layer_idx": True,
    },
    "untied": {"tie_word_embeddings": False},
    "vocabulary of 1": {"vocab_size": 1},
    "vocabulary of 257": {"vocab_size": 257},
    "vocabulary of 128": {"vocab_size": 128},
    "heads of 1": heads(1, 6),
    "heads of 8": heads(8, 5),
    "heads of 59": heads(59, 3),
    "heads of 64": heads(64, 2),
    "one head": heads(32, 1),
    "one layer": {"n_layer": 1},
}


def loud(config: GPT2Config, seed: int) -> Weights:
    """Random weights under which attention is far from uniform and activations far from linear."""
    weights = Weights.random(config, seed)
    for name in ("qkv_w", "fc_w", "out_w", "proj_w", "wte", "wpe"):
        getattr(weights, name)[...] *= 8
    return weights


def assert_close(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    """Within 1e-4 of the largest logit."""
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    relative = np.abs(ours - theirs).max() / np.abs(theirs).max()
    print(f"{what}: {relative:.2e} of the largest logit")
    assert relative <= 1e-4


def some_ids(config: GPT2Config, batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config.vocab_size, (batch, length))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_embedded_logits(embedded, embedded_folder, hugging_face, their_logits, attention):
    theirs = hugging_face(embedded_folder, attention)
    for batch, length in ((1, embedded.config.n_positions), (3, 17), (1, 1)):
        ids = some_ids(embedded.config, batch, length)
        assert_close(embedded(ids), their_logits(theirs, ids), f"embedded {batch} x {length}")
    ids = embedded.encode("First Citizen:\nBefore we proceed any further, hear me speak.")
    assert_close(embedded(ids), their_logits(theirs, ids), "embedded, text")


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_every_configuration(tmp_path, hugging_face, their_logits, variant):
    config = dataclasses.replace(SMALL, **VARIANTS[variant])
    write_checkpoint(tmp_path, config, weights=loud(config, 1))
    ids = some_ids(config, 2, config.n_positions)
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu")
    assert ours.config == config
    assert_close(ours(ids), their_logits(hugging_face(tmp_path), ids), variant)


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("stored", DTYPES)
def test_logits_of_stored_dtypes_and_key_styles(
    tmp_path, hugging_face, their_logits, stored, prefix
):
    weights = Weights.random(SMALL, 2, DTYPES[stored])
    write_checkpoint(tmp_path, SMALL, weights=weights, prefix=prefix)
    ids = some_ids(SMALL, 2, 40)
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu")
    assert_close(ours(ids), their_logits(hugging_face(tmp_path), ids), stored)


def test_logits_of_the_124m_shape(tmp_path, hugging_face, their_logits):
    config = GPT2Config.from_name("gpt2")
    write_checkpoint(tmp_path, config, 3)
    ids = some_ids(config, 1, 96)
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu")
    assert_close(ours(ids), their_logits(hugging_face(tmp_path), ids), "124M")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_our_error_is_that_of_hugging_face(tmp_path, hugging_face, their_logits, attention):
    """Median over 20 seeds of our RMS error against float64, over theirs: at most 1.1."""
    ratios = []
    for seed in range(20):
        weights = write_checkpoint(tmp_path, MIDDLE, seed)
        ids = some_ids(MIDDLE, 1, 64, seed)
        exact = GPT2(MIDDLE, widened(MIDDLE, weights))(ids)
        theirs = hugging_face(tmp_path, attention)
        own, other = GPT2(MIDDLE, weights)(ids), their_logits(theirs, ids)
        ratios.append(errors(own, exact)[1] / errors(other, exact)[1])
        # The oracle is ours: it must be theirs too, or the ratio says nothing.
        assert errors(their_logits(theirs.double(), ids), exact)[0] <= 1e-12 * np.abs(exact).max()
    print(f"{attention}: median {median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    assert median(ratios) <= 1.1


TEXTS = [
    "",
    " ",
    "ROMEO:\nBut, soft! what light through yonder window breaks?",
    "I'll don't we've they're she'd it's I'M 'S",
    "two  spaces,   three\n\n\nlines\t\ttabs   ",
    "naïve café — “quotes” … 1234567 3.14 ½",
    "日本語 Привет עברית 🙂👩‍👩‍👧 \u0000\u200b",
    "snake_case(x)[0] != {a: -1};  // #$%^&*",
]


def test_embedded_tokenizer_loads_in_transformers(embedded, embedded_folder):
    theirs = transformers.GPT2TokenizerFast.from_pretrained(embedded_folder)
    assert theirs.eos_token_id == embedded.tokenizer.eot_token == embedded.config.eos_token_id
    for text in TEXTS:
        ids = embedded.tokenizer.encode(text)
        assert ids == theirs.encode(text), text
        assert embedded.tokenizer.decode(ids) == text
        plain = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        assert theirs.decode(ids, **plain) == text
    # Ours takes a special token in a text for plain text: "split_special_tokens" of theirs.
    marked = "one<|endoftext|>two"
    theirs.split_special_tokens = True
    assert embedded.tokenizer.encode(marked) == theirs.encode(marked)


def test_embedded_configuration_is_read_alike(embedded, their_embedded):
    for field in dataclasses.fields(GPT2Config):
        assert getattr(their_embedded.config, field.name, None) == getattr(
            embedded.config, field.name
        ) or field.name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")


def test_logits_of_the_chosen_model(chosen, their_logits):
    lm, theirs = chosen
    for batch, length in ((1, min(512, lm.config.n_positions)), (2, 33)):
        ids = some_ids(lm.config, batch, length)
        assert_close(lm(ids), their_logits(theirs, ids), lm.name)
    ids = lm.encode("Alan Turing theorized that computers would one day become")
    assert_close(lm(ids), their_logits(theirs, ids), lm.name)


def test_tokens_of_the_chosen_model(chosen, source, gpt2_folder):
    lm, _ = chosen
    # llm.c's files hold GPT-2's tokens only.
    where = gpt2_folder if source.is_llmc else source.their_name
    theirs = transformers.GPT2TokenizerFast.from_pretrained(where)
    for text in TEXTS:
        assert lm.tokenizer.encode(text) == theirs.encode(text), text


@pytest.mark.parametrize("config", [SMALL, MIDDLE], ids=["small", "middle"])
def test_hidden_states(tmp_path, hugging_face, config):
    """What hidden() gives, after the last norm, is the last of their hidden states."""
    weights = write_checkpoint(tmp_path, config, weights=loud(config, 6))
    ids = some_ids(config, 2, 33)
    hidden = GPT2.from_pretrained(str(tmp_path), device="cpu").hidden(ids)
    assert hidden.shape == (2, 33, config.n_embd)
    normed = ops.layer_norm(hidden.reshape(66, -1), weights.lnf_w, weights.lnf_b)
    with torch.inference_mode():
        found = hugging_face(tmp_path)(torch.as_tensor(ids), output_hidden_states=True)
    theirs = found.hidden_states[-1].numpy().reshape(66, -1)
    assert np.abs(normed - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("config", [SMALL, MIDDLE], ids=["small", "middle"])
@pytest.mark.parametrize("batch, length", [(2, 33), (1, 1)])
def test_hidden_states_of_every_layer(tmp_path, hugging_face, config, batch, length):
    write_checkpoint(tmp_path, config, weights=loud(config, 6))
    ids = some_ids(config, batch, length)
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu").hidden_states(ids)
    with torch.inference_mode():
        found = hugging_face(tmp_path)(torch.as_tensor(ids), output_hidden_states=True)
    assert len(ours) == len(found.hidden_states) == config.n_layer + 1
    for mine, state in zip(ours, found.hidden_states, strict=True):
        theirs = state.numpy()
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert np.abs(mine - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert np.abs(np.diff(ours, axis=0)).max(axis=(1, 2, 3)).min() > 0, "each layer does something"


def test_hidden_states_of_the_embedded_model(embedded, their_embedded):
    ids = embedded.encode("But, soft! what light").reshape(1, -1)
    with torch.inference_mode():
        found = their_embedded(torch.as_tensor(ids), output_hidden_states=True).hidden_states
    for mine, theirs in zip(embedded.hidden_states(ids), found, strict=True):
        assert np.abs(mine - theirs.numpy()).max() <= 1e-4 * np.abs(theirs.numpy()).max()
