"""LoRA adapters as PEFT writes them: what is merged, and what is refused by its name."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from adapter_writer import C_ATTN, WIDTH, factors, write_adapter
from builders import BFLOAT16, TINY, write_checkpoint
from command import call, done
from torch_writer import write_legacy

import gpt2cupy
from gpt2cupy import checkpoint
from gpt2cupy.errors import CheckpointError, InputError
from gpt2cupy.weights import Weights

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)


@pytest.fixture
def base(tmp_path) -> Path:
    write_checkpoint(tmp_path / "base", TINY)
    return tmp_path / "base"


def loaded(base: Path, adapter: Path | None) -> Weights:
    found = checkpoint.open(base, adapter=adapter)
    return Weights.from_tensors(found.config, found.tensors(finite=True), np.float32)


def refused(base: Path, adapter: Path, what: str) -> CheckpointError:
    with pytest.raises(CheckpointError, match=what) as caught:
        for _ in checkpoint.open(base, adapter=adapter).tensors(finite=True):
            pass
    assert caught.value.where and caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 6 / 4),
        ({"use_rslora": True}, 6 / math.sqrt(4)),
        ({"r": 8, "rank_pattern": {"c_attn": 4}}, 6 / 4),
        ({"r": 8, "rank_pattern": {"h.0.attn.c_attn": 7, "h.1.attn.c_attn": 4}}, 6 / 4),
        ({"r": 8, "rank_pattern": {"attn": 7, r"h\.\d+\.attn\.c_attn": 4}}, 6 / 4),
        ({"alpha_pattern": {"attn.c_attn": 10, "c_attn": 3}}, 10 / 4),
        ({"alpha_pattern": {"ttn.c_attn": 10}}, 6 / 4),
        ({"lora_alpha": 0.5}, 0.5 / 4),
        ({"some_new_option": None, "peft_version": "99"}, 6 / 4),
    ],
    ids=str,
)
def test_the_scale(tmp_path, base, changes, scale):
    tensors = factors()
    adapter = write_adapter(tmp_path / "adapter", tensors, **changes)
    plain, merged = loaded(base, None), loaded(base, adapter)
    a, b = tensors.values()
    expected = plain.qkv_w[1] + b @ a * np.float32(scale)
    np.testing.assert_allclose(merged.qkv_w[1], expected, rtol=1e-6, atol=1e-6)
    assert np.array_equal(merged.qkv_w[0], plain.qkv_w[0])
    for name, array in plain.items():
        if name != "qkv_w":
            assert np.array_equal(getattr(merged, name), array)


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
def test_narrow_factors_and_a_narrow_model(tmp_path, dtype):
    write_checkpoint(tmp_path / "base", TINY, dtype=dtype)
    tensors = {key: array.astype(dtype) for key, array in factors().items()}
    adapter = write_adapter(tmp_path / "adapter", tensors)
    a, b = (array.astype(np.float32) for array in tensors.values())
    expected = loaded(tmp_path / "base", None).qkv_w[1] + b @ a * np.float32(1.5)
    assert np.array_equal(loaded(tmp_path / "base", adapter).qkv_w[1], expected)
    assert checkpoint.open(tmp_path / "base", adapter=adapter).dtype == dtype


def test_weights_of_torch_save(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter")
    expected = loaded(base, adapter).qkv_w
    write_legacy(adapter / "adapter_model.bin", factors())
    (adapter / "adapter_model.safetensors").unlink()
    assert np.array_equal(loaded(base, adapter).qkv_w, expected)


def test_tensors_that_the_adapter_holds_whole(tmp_path, base):
    values = np.arange(WIDTH, dtype=np.float32)
    whole = {
        "base_model.model.transformer.ln_f.weight": values,
        "base_model.model.transformer.h.0.mlp.c_proj.base_layer.bias": values + 1,
        "base_model.model.lm_head.weight": np.ones((TINY.vocab_size, WIDTH), np.float32),
    }
    adapter = write_adapter(tmp_path / "adapter", factors() | whole)
    merged, plain = loaded(base, adapter), loaded(base, None)
    assert np.array_equal(merged.lnf_w, values)
    assert np.array_equal(merged.out_b[0], values + 1)
    assert np.array_equal(merged.wte, plain.wte)
    assert (merged.lm_head[: TINY.vocab_size] == 1).all()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"peft_type": "IA3"}, "type IA3, not LORA"),
        ({"peft_type": None}, "type None"),
        ({"task_type": "SEQ_CLS"}, "task SEQ_CLS"),
        ({"use_dora": True}, "use_dora"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"lora_bias": True}, "lora_bias"),
        ({"some_new_option": {"a": 1}}, "some_new_option"),
        ({"init_lora_weights": "pissa_niter_16"}, "pissa_niter_16"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"r": 0}, "0 is no rank"),
        ({"r": "4"}, "'4' is no rank"),
        ({"lora_alpha": float("nan")}, "nan is no rank or alpha"),
        ({"lora_alpha": None}, "None is no rank or alpha"),
        ({"rank_pattern": [3]}, "rank_pattern is no object"),
        ({"rank_pattern": {"c_attn": 2.5}}, "2.5 is no rank"),
        ({"alpha_pattern": {"(a*)*b": 3}}, "expression"),
        ({"alpha_pattern": {".*.*.*.*c_attn": 3}}, "expression"),
        ({"alpha_pattern": {"[": 3}}, "expression"),
        ({"r": 8}, "rank 8"),
    ],
    ids=str,
)
def test_what_is_refused_by_name(tmp_path, base, changes, what):
    refused(base, write_adapter(tmp_path / "adapter", **changes), what)


@pytest.mark.parametrize(
    ("tensors", "what"),
    [
        (factors(C_ATTN.replace("h.1", "h.7")), "h.7.attn.c_attn, which the model has not"),
        (factors(rows=99), r"shape \[99, 4\]"),
        (dict(list(factors().items())[:1]), "has lora_A for"),
        (factors() | {f"{C_ATTN}.lora_magnitude_vector": np.ones(3, np.float32)}, "magnitude"),
        (factors() | {f"{C_ATTN}.lora_B.bias": np.ones(3, np.float32)}, r"lora_B\.bias"),
        (factors() | {"base_model.model.transformer.x": np.ones(3, np.float32)}, "does not use"),
        ({f"{C_ATTN[:-18]}.ln_1.lora_A.weight": np.ones((4, 32), np.float32)}, "ln_1|has lora_A"),
        (factors("base_model.model.transformer.wte", 211), "embedding and head at once"),
        (factors("base_model.model.lm_head", 211), "embedding and head at once"),
        ({k: v * np.float32("nan") for k, v in factors().items()}, "NaN"),
        ({k: v.astype(np.int32) for k, v in factors().items()}, "of type I32|int32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensors_that_do_not_fit(tmp_path, base, tensors, what):
    refused(base, write_adapter(tmp_path / "adapter", tensors), what)


def test_an_untied_head_is_adapted(tmp_path):
    write_checkpoint(tmp_path / "base", UNTIED)
    tensors = factors("base_model.model.lm_head", TINY.vocab_size)
    adapter = write_adapter(tmp_path / "adapter", tensors)
    plain, merged = loaded(tmp_path / "base", None), loaded(tmp_path / "base", adapter)
    a, b = tensors.values()
    np.testing.assert_allclose(
        merged.lm_head[:211] - plain.lm_head[:211], 1.5 * b @ a, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 9999, " " * (2 << 20)], ids=len)
def test_broken_configurations(tmp_path, base, text):
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(text)
    refused(base, adapter, "adapter configuration")


def test_missing_files(tmp_path, base):
    adapter = write_adapter(tmp_path / "adapter")
    (adapter / "adapter_model.safetensors").unlink()
    refused(base, adapter, "no adapter_model.safetensors or adapter_model.bin")
    (adapter / "adapter_config.json").unlink()
    refused(base, adapter, "no adapter_config.json")
    refused(base, base, "no adapter_config.json")
    refused(base, tmp_path / "nowhere", "no folder")
    with pytest.raises(InputError, match="an adapter cannot be an int"):
        checkpoint.open(base, adapter=5)


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_on_a_gpu(tmp_path, base, quantize):
    adapter = write_adapter(tmp_path / "adapter")
    options = {"adapter": adapter, "dtype": "float32", "quantize": quantize}
    ours = gpt2cupy.GPT2.from_pretrained(base, device="cuda", **options)([[1, 2, 3]]).get()
    expected = gpt2cupy.GPT2.from_pretrained(base, device="cpu", **options)([[1, 2, 3]])
    np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-3)


def test_loaded_by_the_library_and_by_the_command(tmp_path):
    """On the embedded model, through every door."""
    with gpt2cupy.load(device="cpu") as lm:
        config = lm.config
        plain = lm.generate("ROMEO:", max_new_tokens=5).text
    rng = np.random.default_rng(0)
    tensors = {
        f"base_model.model.transformer.h.0.mlp.c_fc.lora_{part}.weight": rng.normal(size=shape)
        for part, shape in (("A", (4, config.n_embd)), ("B", (config.inner_size, 4)))
    }
    adapter = write_adapter(tmp_path / "a", {k: v.astype("f4") for k, v in tensors.items()})
    with gpt2cupy.load(adapter=adapter, device="cpu") as lm:
        adapted = lm.generate("ROMEO:", max_new_tokens=5).text
    assert adapted != plain
    options = ["--device", "cpu", "--adapter", str(adapter)]
    assert adapted in done("generate", "ROMEO:", "--max-new-tokens", "5", *options)
    code, _, err = call("score", "ROMEO:", *options, "--adapter", str(tmp_path))
    assert code == 1 and "adapter_config.json" in err
