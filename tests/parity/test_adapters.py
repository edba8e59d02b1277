"""LoRA adapters that PEFT itself writes: merged, our logits are those of PEFT's merged model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from builders import TINY, write_checkpoint

import gpt2cupy
from gpt2cupy.errors import CheckpointError

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
IDS = np.arange(40)[None] * 5 % TINY.vocab_size
pytestmark = pytest.mark.filterwarnings("ignore:::peft")


def train(model, adapter, **options):
    """An adapter with random factors, as training leaves it, written to its folder."""
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * 0.1
    wrapped.save_pretrained(adapter)


@pytest.fixture
def agree(tmp_path, hugging_face, their_logits):
    def compare(config=TINY, **options) -> None:
        base, adapter = tmp_path / "base", tmp_path / "adapter"
        write_checkpoint(base, config)
        train(hugging_face(base), adapter, **options)
        merged = peft.PeftModel.from_pretrained(hugging_face(base), adapter).merge_and_unload()
        theirs = their_logits(merged, IDS)
        plain = their_logits(hugging_face(base), IDS)
        ours = gpt2cupy.GPT2.from_pretrained(base, adapter=adapter, device="cpu")(IDS)
        assert np.abs(plain - theirs).max() > 1e-2 * np.abs(theirs).max(), "the adapter does much"
        assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()

    return compare


ATTENTION = {"target_modules": ["c_attn"]}
EVERY = {"target_modules": ["c_attn", "c_proj", "c_fc"]}


@pytest.mark.parametrize(
    "options",
    [
        ATTENTION,
        EVERY,
        EVERY | {"fan_in_fan_out": True},
        EVERY | {"fan_in_fan_out": False},
        EVERY | {"r": 4, "lora_alpha": 32},
        EVERY | {"use_rslora": True, "r": 3},
        EVERY | {"rank_pattern": {"c_fc": 2, "h.1.attn.c_attn": 5}},
        EVERY | {"rank_pattern": {r"h\.0\.attn\..*": 2}, "alpha_pattern": {r"h\.0.*c_attn": 40}},
        EVERY | {"alpha_pattern": {"mlp.c_proj": 64, "c_proj": 2}},
        EVERY | {"layers_to_transform": [1]},
        EVERY | {"bias": "all"},
        EVERY | {"bias": "lora_only"},
        EVERY | {"init_lora_weights": "gaussian"},
        {"target_modules": "all-linear"},
        {"target_modules": ["c_attn", "wpe"]},
        ATTENTION | {"modules_to_save": ["ln_f", "wpe"]},
        ATTENTION | {"modules_to_save": ["lm_head"]},
        ATTENTION | {"modules_to_save": ["wte"]},
        ATTENTION | {"modules_to_save": ["lm_head", "wte"]},
    ],
    ids=str,
)
def test_merged_logits(agree, options):
    agree(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["c_attn", "lm_head", "wte"]},
        ATTENTION | {"modules_to_save": ["lm_head"]},
        ATTENTION | {"modules_to_save": ["wte", "lm_head"]},
    ],
    ids=str,
)
def test_untied_models(agree, options):
    agree(UNTIED, **options)


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_narrow_factors(tmp_path, hugging_face, their_logits, stored):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, TINY)
    train(hugging_face(base).to(getattr(torch, stored)), adapter, **EVERY)
    merged = peft.PeftModel.from_pretrained(hugging_face(base), adapter).merge_and_unload()
    theirs = their_logits(merged.float(), IDS)
    ours = gpt2cupy.GPT2.from_pretrained(base, adapter=adapter, device="cpu")(IDS)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["c_attn", "wte"]}, "wte, which is embedding and head"),
        ({"target_modules": ["c_attn", "lm_head"]}, "lm_head, which is embedding and head"),
    ],
    ids=str,
)
def test_what_is_refused_by_name(tmp_path, hugging_face, options, name):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, TINY)
    train(hugging_face(base), adapter, **(ATTENTION | options))
    with pytest.raises(CheckpointError, match=name) as caught:
        gpt2cupy.GPT2.from_pretrained(base, adapter=adapter, device="cpu")
    assert "merge_and_unload" in caught.value.remedy


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.IA3Config(task_type="CAUSAL_LM", target_modules=["c_attn"],
                               feedforward_modules=[]),
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["IA3", "PROMPT_TUNING"],
)  # fmt: skip
def test_other_kinds_of_adapters(tmp_path, hugging_face, request, config):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_checkpoint(base, TINY)
    peft.get_peft_model(hugging_face(base), config()).save_pretrained(adapter)
    with pytest.raises(CheckpointError, match=request.node.callspec.id):
        gpt2cupy.GPT2.from_pretrained(base, adapter=adapter, device="cpu")


def test_the_remedy_gives_the_same_logits(tmp_path, hugging_face, their_logits):
    """A refused adapter, merged in PEFT as the error says, loads as a model."""
    base, adapter, whole = (tmp_path / name for name in ("base", "adapter", "whole"))
    write_checkpoint(base, TINY)
    train(hugging_face(base), adapter, use_dora=True, **ATTENTION)
    merged = peft.PeftModel.from_pretrained(hugging_face(base), adapter).merge_and_unload()
    merged.save_pretrained(whole)
    ours = gpt2cupy.GPT2.from_pretrained(whole, device="cpu")(IDS)
    theirs = their_logits(merged, IDS)
    assert np.abs(ours - theirs).max() <= 1e-4 * np.abs(theirs).max()
    assert json.loads((adapter / "adapter_config.json").read_text())["use_dora"]
