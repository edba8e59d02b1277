"""GPT2Config: what Hugging Face writes is read, what no GPT-2 can be is refused."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from gpt2cupy import GPT2Config
from gpt2cupy.errors import ConfigError

SMALL = {"vocab_size": 100, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}


def test_defaults_are_gpt2():
    assert GPT2Config() == GPT2Config.from_dict({"model_type": "gpt2"})
    assert GPT2Config().padded_vocab_size == 50304
    assert GPT2Config().inner_size == 3072


def test_fields_survive_a_file(tmp_path):
    config = GPT2Config(
        **SMALL,
        n_inner=24,
        activation_function="gelu",
        layer_norm_epsilon=1e-6,
        scale_attn_weights=False,
        scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    assert GPT2Config.from_json(path) == config
    changed = [
        field.name
        for field in dataclasses.fields(config)
        if getattr(config, field.name) == field.default
    ]
    assert not changed, "a field at its default would not show that it was read"


def test_aliases_go_before_the_fields_they_stand_for():
    config = GPT2Config.from_dict(
        {
            "n_embd": 999,
            "hidden_size": 8,
            "num_attention_heads": 2,
            "num_hidden_layers": 3,
            "max_position_embeddings": 32,
            "n_ctx": 7,
        }
    )
    found = config.n_embd, config.n_head, config.n_layer, config.n_positions
    assert found == (8, 2, 3, 32)


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("gelu_new", "gelu_tanh"),
        ("gelu_pytorch_tanh", "gelu_tanh"),
        ("gelu", "gelu_erf"),
        ("relu", "relu"),
        ("silu", "silu"),
        ("swish", "silu"),
        ("tanh", "tanh"),
    ],
)
def test_activations(name, op):
    assert GPT2Config(activation_function=name).activation == op


def test_attention_scale():
    assert GPT2Config(**SMALL).attention_scale(3) == 0.5
    assert GPT2Config(**SMALL, scale_attn_weights=False).attention_scale(3) == 1
    assert GPT2Config(**SMALL, scale_attn_by_inverse_layer_idx=True).attention_scale(3) == 0.125


@pytest.mark.parametrize("value", [None, [], -1, 100, 50256])
def test_an_end_that_cannot_be_produced_is_none(value):
    assert GPT2Config(**SMALL, eos_token_id=value).eos_token_id is None


@pytest.mark.parametrize("value", [7, [7]])
def test_one_end(value):
    assert GPT2Config(**SMALL, eos_token_id=value).eos_token_id == 7


@pytest.mark.parametrize(
    "fields",
    [
        *({name: value} for name in SMALL for value in (0, -1, "8", 8.0, True, None, [8])),
        *({"n_inner": value} for value in (0, True, "32")),
        {"n_embd": 9, "n_head": 2},
        *({"activation_function": value} for value in ("gelu_10", "", None, ["relu"], {})),
        *(
            {"layer_norm_epsilon": value}
            for value in (-1e-5, float("nan"), float("inf"), "1e-5", None, True)
        ),
        *(
            {name: value}
            for name in (
                "scale_attn_weights",
                "scale_attn_by_inverse_layer_idx",
                "reorder_and_upcast_attn",
                "tie_word_embeddings",
            )
            for value in ("true", 1, None)
        ),
        *({"eos_token_id": value} for value in ([1, "2"], "7", 7.0, True)),
        {"bos_token_id": [1, 2]},
        {"model_type": "llama"},
        {"model_type": None},
        {"add_cross_attention": True},
        {"pruned_heads": {"0": [1]}},
        {"quantization_config": {"bits": 4}},
    ],
    ids=str,
)
def test_what_no_gpt2_can_be_is_refused(fields):
    with pytest.raises(ConfigError) as caught:
        GPT2Config.from_dict(SMALL | fields, where="here/config.json")
    assert caught.value.where == "here/config.json"
    assert caught.value.remedy
    # Options that are fields are checked in Python too.
    if fields.keys() <= {field.name for field in dataclasses.fields(GPT2Config)}:
        with pytest.raises(ConfigError):
            GPT2Config(**(SMALL | fields))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, "\x00", '{"vocab_size": 1' + "0" * 5000 + "}"]
)
def test_broken_json(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        GPT2Config.from_json(path)
    assert str(path) in caught.value.where


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json"):
        GPT2Config.from_json(tmp_path / "config.json")


def test_not_utf8(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b'{"model_type": "\xff"}')
    with pytest.raises(ConfigError):
        GPT2Config.from_json(path)


def test_the_published_file():
    """The fields of openai-community/gpt2: most of them say nothing about logits."""
    fields = {
        "activation_function": "gelu_new",
        "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1,
        "bos_token_id": 50256,
        "embd_pdrop": 0.1,
        "eos_token_id": 50256,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05,
        "model_type": "gpt2",
        "n_ctx": 1024,
        "n_embd": 768,
        "n_head": 12,
        "n_layer": 12,
        "n_positions": 1024,
        "resid_pdrop": 0.1,
        "summary_activation": None,
        "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True,
        "summary_type": "cls_index",
        "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    }
    assert GPT2Config.from_dict(fields) == GPT2Config.from_name("gpt2") == GPT2Config()


def test_published_shapes():
    assert GPT2Config.from_name("gpt2-xl").n_embd == 1600
    with pytest.raises(ConfigError, match="gpt2-medium"):
        GPT2Config.from_name("gpt3")


def test_scalars_of_numpy_are_numbers():
    fields = {"vocab_size": np.int64(90), "n_layer": np.uint8(2), "n_head": np.int32(2)}
    config = GPT2Config(**fields, n_embd=8, eos_token_id=[np.int16(5), 6], bos_token_id=np.int8(3))
    assert config == GPT2Config(
        vocab_size=90, n_layer=2, n_head=2, n_embd=8, eos_token_id=(5, 6), bos_token_id=3
    )
    assert config.eos_token_ids == (5, 6) and type(config.vocab_size) is int
    assert json.loads(json.dumps(config.to_dict()))["eos_token_id"] == [5, 6]
