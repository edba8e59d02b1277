"""What Hugging Face makes of a checkpoint's keys, head and options, against what we make of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from builders import TINY, write_checkpoint
from safetensors.numpy import load_file, save_file

import gpt2cupy
from gpt2cupy import GPT2Config, checkpoint

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
IDS = np.arange(40)[None] * 5 % TINY.vocab_size


@pytest.fixture
def agree(tmp_path, hugging_face, their_logits):
    """Compare the logits of both on the folder."""

    def compare() -> None:
        theirs = their_logits(hugging_face(tmp_path), IDS)
        ours = gpt2cupy.GPT2.from_pretrained(tmp_path, device="cpu")(IDS)
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()

    return compare


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_forms_of_a_checkpoint(tmp_path, agree, config, prefix, shards):
    write_checkpoint(tmp_path, config, prefix=prefix, shards=shards)
    agree()


def test_a_stored_head_that_differs_though_the_config_says_tied(tmp_path, agree):
    write_checkpoint(tmp_path, UNTIED)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    agree()


def test_a_stored_head_that_equals_the_embedding(tmp_path, agree):
    write_checkpoint(tmp_path, TINY)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()}))
    agree()


def test_a_head_alone(tmp_path, agree):
    write_checkpoint(tmp_path, TINY)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    agree()


def test_buffers_of_old_checkpoints(tmp_path, agree):
    write_checkpoint(tmp_path, TINY)
    mask = np.tril(np.ones((1, 1, 48, 48), np.uint8))
    buffers = {f"transformer.h.{i}.attn.bias": mask for i in range(TINY.n_layer)}
    buffers["transformer.h.0.attn.masked_bias"] = np.array(-1e4, np.float32)
    edit(tmp_path, lambda tensors: tensors.update(buffers))
    agree()


@pytest.mark.parametrize(
    "activation",
    [
        *("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
        *("gelu", "gelu_python", "relu", "silu", "swish", "tanh"),
    ],
)
def test_activations(tmp_path, agree, activation):
    write_checkpoint(tmp_path, dataclasses.replace(TINY, activation_function=activation))
    agree()


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": 32, "n_embd": 64},
        {"max_position_embeddings": 48, "n_positions": 99},
        {"num_hidden_layers": 2, "num_attention_heads": 2, "n_layer": 5, "n_head": 4},
        {"n_ctx": 7},
        {"n_inner": None},
        {"layer_norm_epsilon": 1e-3},
        {"eos_token_id": [3]},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True},
        {"reorder_and_upcast_attn": True},
    ],
    ids=str,
)
def test_fields_of_the_configuration(tmp_path, agree, fields):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict() | fields))
    agree()


@pytest.mark.parametrize("shards", [{}, {"max_shard_size": "60KB"}], ids=["one", "shards"])
def test_variants(tmp_path, their_logits, shards):
    """A folder with two sets of weights: each name gives those that transformers takes."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_checkpoint(tmp_path, TINY, 0)
    write_checkpoint(tmp_path / "other", TINY, 1)
    other = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "other", dtype=torch.float16)
    other.save_pretrained(tmp_path, variant="fp16", **shards)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, variant="fp16").float().eval()
    ours = gpt2cupy.GPT2.from_pretrained(tmp_path, variant="fp16", device="cpu")(IDS)
    expected = their_logits(theirs, IDS)
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    assert checkpoint.open(tmp_path, variant="fp16").dtype == np.float16
    assert checkpoint.open(tmp_path).dtype == np.float32


def test_heads_for_other_tasks(tmp_path, agree):
    """A classifier's and a value head beside the model; position_ids of old checkpoints."""
    write_checkpoint(tmp_path, TINY)
    heads = {
        "score.weight": np.ones((2, 32), np.float32),
        "v_head.summary.weight": np.ones((1, 32), np.float32),
        "transformer.position_ids": np.arange(48)[None],
    }
    edit(tmp_path, lambda tensors: tensors.update(heads))
    with pytest.warns(RuntimeWarning, match="do not enter the logits"):
        agree()


def test_a_configuration_that_transformers_wrote(tmp_path):
    transformers = pytest.importorskip("transformers")
    transformers.GPT2Config(n_layer=3, n_inner=7, activation_function="silu").save_pretrained(
        tmp_path
    )
    expected = GPT2Config(n_layer=3, n_inner=7, activation_function="silu")
    assert GPT2Config.from_json(tmp_path / "config.json") == expected


@pytest.mark.parametrize(
    "saving, tied",
    [
        ({}, True),
        ({}, False),
        ({"max_shard_size": "60KB"}, True),
        ({"max_shard_size": "60KB"}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_what_transformers_saves(tmp_path, agree, saving, tied, stored):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        **{name: value for name, value in TINY.to_dict().items() if name != "architectures"}
        | {"tie_word_embeddings": tied, "initializer_range": 0.2}
    )
    transformers.set_seed(0)
    model = transformers.GPT2LMHeadModel(config).to(getattr(torch, stored))
    model.save_pretrained(tmp_path, **saving)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == bool(saving)
    found = checkpoint.open(tmp_path)
    assert (found.dtype.name, found.config.tie_word_embeddings) == (stored, tied)
    agree()
