"""Checkpoints in Hugging Face layout: what is read, and tensors that are wrong."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from builders import BFLOAT16, TINY, hf_tensors, write_checkpoint, write_tensors
from refused_checkpoint import MEMORY, refused
from safetensors.numpy import load_file, save_file

from gpt2cupy import checkpoint
from gpt2cupy.errors import CheckpointError, ConfigError, InputError
from gpt2cupy.weights import Weights

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}


def loaded(path: Path) -> Weights:
    found = checkpoint.open(path)
    return Weights.from_tensors(found.config, found.tensors(finite=True), found.dtype)


def same(one: Weights, other: Weights) -> bool:
    theirs = dict(other.items())
    mine = dict(one.items())
    return mine.keys() == theirs.keys() and all(
        # A checkpoint stores every bias in its dtype; ours keeps two kinds in float32.
        np.array_equal(array.astype(one.dtype), theirs[name].astype(one.dtype))
        for name, array in mine.items()
    )


def edit(folder: Path, change) -> None:
    """Apply ``change`` to the dict of stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_form_gives_the_same_weights(tmp_path, config, dtype, prefix, shards):
    weights = write_checkpoint(tmp_path, config, 0, dtype, prefix=prefix, shards=shards)
    found = checkpoint.open(tmp_path)
    assert found.config == config
    assert found.dtype == dtype
    assert found.nbytes == sum(a.nbytes for a in hf_tensors(config, weights).values())
    assert same(loaded(tmp_path), weights)


def test_tensors_are_read_only_views_in_rows(tmp_path):
    write_checkpoint(tmp_path, TINY)
    for name, _, array in checkpoint.open(tmp_path).tensors():
        assert not array.flags.writeable and not array.flags.owndata
        # The GPU loader transposes what Conv1D stored as [in, out].
        transposed = name in ("qkv_w", "proj_w", "fc_w", "out_w")
        assert array.flags.f_contiguous if transposed else array.flags.c_contiguous
        assert array.shape[-1] == (TINY.inner_size if name == "out_w" else array.shape[-1])


def test_reading_maps_and_does_not_load(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=50_000, n_embd=64)
    write_checkpoint(tmp_path, config)
    assert (tmp_path / "model.safetensors").stat().st_size > 12 << 20
    tracemalloc.start()
    for _ in checkpoint.open(tmp_path).tensors(finite=True):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY


def test_the_embedded_model():
    found = checkpoint.open("shakespeare")
    assert (found.name, found.dtype) == ("shakespeare", np.float16)
    assert sum(array.nbytes for _, _, array in found.tensors(finite=True)) == found.nbytes


def test_buffers_and_other_heads_are_left_out(tmp_path):
    weights = write_checkpoint(tmp_path, TINY)
    mask = np.tril(np.ones((1, 1, 48, 48), np.uint8))
    extra = {f"transformer.h.{i}.attn.bias": mask for i in range(2)}
    extra |= {"transformer.h.0.attn.masked_bias": np.array(-1e4, np.float32)}
    edit(tmp_path, lambda tensors: tensors.update(extra))
    assert same(loaded(tmp_path), weights)


@pytest.mark.parametrize(
    "keys",
    [
        ["v_head.summary.weight", "v_head.summary.bias"],
        ["v_head.0.weight", "v_head.2.bias"],
        ["multiple_choice_head.summary.weight"],
        ["summary.summary.weight"],
        ["score.weight", "classifier.bias"],
        ["transformer.position_ids", "transformer.h.0.attn.position_ids"],
        [f"qa_outputs.{i}" for i in range(9)],
    ],
    ids=lambda keys: keys[0],
)
def test_tensors_of_other_tasks_are_left_out_and_named_once(tmp_path, keys):
    weights = write_checkpoint(tmp_path, TINY)
    extra = {key: np.zeros((2, 32), np.int64) for key in keys}
    edit(tmp_path, lambda tensors: tensors.update(extra))
    with pytest.warns(RuntimeWarning, match=r"do not enter the logits: .*summary|:") as said:
        assert same(loaded(tmp_path), weights)
    assert len(said) == 1
    text = str(said[0].message)
    assert all(key in text for key in keys[:5])
    assert ("and 4 more" in text) == (len(keys) == 9)


@pytest.mark.parametrize(
    "wrapper",
    ["_orig_mod.", "module.", "base_model.model.", "module._orig_mod.", "model.", "base_model."],
)
@pytest.mark.parametrize("prefix", [True, False])
def test_what_wrappers_leave_before_every_key(tmp_path, wrapper, prefix):
    weights = write_checkpoint(tmp_path, UNTIED, prefix=prefix)
    write_tensors(
        tmp_path, {wrapper + k: v for k, v in load_file(tmp_path / "model.safetensors").items()}
    )
    assert same(loaded(tmp_path), weights)


def test_a_wrapper_need_not_hold_its_own_head(tmp_path):
    weights = write_checkpoint(tmp_path, TINY)
    wrapped = {f"base_model.{k}": v for k, v in load_file(tmp_path / "model.safetensors").items()}
    write_tensors(tmp_path, wrapped | {"v_head.0.weight": np.zeros((4, 32), np.float32)})
    with pytest.warns(RuntimeWarning, match=r"v_head\.0\.weight"):
        assert same(loaded(tmp_path), weights)


def test_a_prefix_on_some_keys_is_no_wrapper(tmp_path):
    write_checkpoint(tmp_path, TINY)
    key = "transformer.wpe.weight"
    edit(tmp_path, lambda tensors: tensors.update({f"module.{key}": tensors.pop(key)}))
    assert "wpe.weight is missing" in refused(tmp_path).what


@pytest.mark.parametrize("part", [True, False], ids=["one", "all"])
def test_float64_is_rounded(tmp_path, part):
    weights = write_checkpoint(tmp_path, UNTIED)
    tensors = hf_tensors(UNTIED, weights)
    chosen = ["transformer.h.0.attn.c_attn.weight"] if part else list(tensors)
    wide = {key: tensors[key].astype(np.float64) * (1 + 2**-40) for key in chosen}
    write_tensors(tmp_path, tensors | wide)
    assert checkpoint.open(tmp_path).dtype == np.float32
    assert same(loaded(tmp_path), weights)


@pytest.mark.filterwarnings("error")
def test_float64_beyond_float32_is_not_finite(tmp_path):
    tensors = hf_tensors(TINY, write_checkpoint(tmp_path, TINY))
    key = "transformer.ln_f.bias"
    write_tensors(tmp_path, tensors | {key: np.full(32, 1e300)})
    assert "infinite" in refused(tmp_path).what


@pytest.mark.parametrize("shards", [1, 2])
def test_variants(tmp_path, shards):
    half = write_checkpoint(tmp_path, TINY, 1, np.float16, shards=shards)
    for file in tmp_path.glob("model*.safetensors"):
        file.rename(tmp_path / file.name.replace("model", "model.fp16", 1))
    index = tmp_path / "model.safetensors.index.json"
    if shards == 2:
        text = index.read_text().replace('"model-', '"model.fp16-')
        (tmp_path / "model.safetensors.index.fp16.json").write_text(text)
        index.unlink()
    assert "variant='fp16'" in refused(tmp_path).remedy
    write_checkpoint(tmp_path, TINY, 0)
    found = checkpoint.open(tmp_path, variant="fp16")
    assert found.dtype == np.float16
    assert same(Weights.from_tensors(found.config, found.tensors(), found.dtype), half)
    with pytest.raises(CheckpointError, match="variant 'bf16'") as caught:
        checkpoint.open(tmp_path, variant="bf16")
    assert "'fp16'" in caught.value.remedy
    with pytest.raises(InputError, match="for a file"):
        checkpoint.open(next(tmp_path.glob("model*.safetensors")), variant="fp16")


@pytest.mark.parametrize("variant", ["", "../x", "a/b", 5, "a" * 99, ["fp16"]])
def test_impossible_variants(tmp_path, variant):
    write_checkpoint(tmp_path, TINY)
    with pytest.raises(InputError, match="variant"):
        checkpoint.open(tmp_path, variant=variant)


def test_a_file_of_safetensors_with_its_configuration_beside(tmp_path):
    weights = write_checkpoint(tmp_path, TINY)
    (tmp_path / "model.safetensors").rename(tmp_path / "step-500.safetensors")
    found = checkpoint.open(tmp_path / "step-500.safetensors")
    assert found.path == tmp_path
    assert same(Weights.from_tensors(found.config, found.tensors(), found.dtype), weights)
    (tmp_path / "config.json").unlink()
    assert "no config.json beside it" in refused(tmp_path / "step-500.safetensors").what


def test_a_configuration_above_a_megabyte(tmp_path):
    weights = write_checkpoint(tmp_path, TINY)
    labels = {str(i): "a long name of a class" * 5 for i in range(15_000)}
    config = json.dumps(TINY.to_dict() | {"id2label": labels})
    assert len(config) > 1 << 20
    (tmp_path / "config.json").write_text(config)
    assert same(loaded(tmp_path), weights)
    (tmp_path / "config.json").write_text(config + " " * (17 << 20))
    assert "larger than 16 MiB" in refused(tmp_path, ConfigError).what


def test_mixed_dtypes_are_named_by_most_bytes(tmp_path):
    write_checkpoint(tmp_path, TINY, dtype=np.float16)
    key = "transformer.ln_f.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: tensors[key].astype(np.float32)}))
    assert checkpoint.open(tmp_path).dtype == np.float16


# -- the head ------------------------------------------------------------------------------------


def test_a_stored_head_equal_to_the_embedding_is_tied(tmp_path):
    write_checkpoint(tmp_path, TINY)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t["transformer.wte.weight"].copy()}))
    assert checkpoint.open(tmp_path).config.tie_word_embeddings


def test_a_stored_head_that_differs_is_used_though_the_config_says_tied(tmp_path):
    weights = write_checkpoint(tmp_path, UNTIED)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    assert not checkpoint.open(tmp_path).config.tie_word_embeddings
    assert same(loaded(tmp_path), weights)


def test_a_head_alone_is_the_embedding_too(tmp_path):
    weights = write_checkpoint(tmp_path, TINY)
    edit(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert same(loaded(tmp_path), weights)


def test_an_untied_model_needs_its_head(tmp_path):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "config.json").write_text(json.dumps(UNTIED.to_dict()))
    assert "lm_head.weight is missing" in refused(tmp_path).what


# -- tensors that are wrong ----------------------------------------------------------------------


def test_a_missing_tensor(tmp_path):
    write_checkpoint(tmp_path, TINY)
    edit(tmp_path, lambda tensors: tensors.pop("transformer.h.1.mlp.c_fc.bias"))
    assert "h.1.mlp.c_fc.bias is missing" in refused(tmp_path).what


@pytest.mark.parametrize(
    "key",
    [
        "transformer.h.2.ln_1.bias",
        "transformer.h.0.attn.c_attn.lora_A.weight",
        "transformer.h.0.crossattention.c_attn.weight",
        "model.norm.weight",
        "transformer.lm_head.weight",
    ],
)
def test_a_tensor_that_would_change_the_result(tmp_path, key):
    write_checkpoint(tmp_path, UNTIED)
    edit(tmp_path, lambda tensors: tensors.update({key: np.zeros(32, np.float32)}))
    assert "lm_head" in key or key in refused(tmp_path).what
    refused(tmp_path)


def test_a_tensor_stored_twice(tmp_path):
    write_checkpoint(tmp_path, TINY)
    edit(tmp_path, lambda t: t.update({"wpe.weight": t["transformer.wpe.weight"].copy()}))
    assert "wpe.weight is stored twice" in refused(tmp_path).what


@pytest.mark.parametrize("shape", [(32, 48), (48, 31), (47, 32), (48 * 32,), (48, 32, 1)], ids=str)
def test_a_wrong_shape(tmp_path, shape):
    write_checkpoint(tmp_path, TINY)
    key = "transformer.wpe.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: np.zeros(shape, np.float32)}))
    assert "[48, 32]" in refused(tmp_path).what


@pytest.mark.parametrize(
    "dtype", [np.int64, np.int32, np.int8, np.bool_, ml_dtypes.float8_e4m3fn], ids=str
)
def test_a_wrong_dtype(tmp_path, dtype):
    write_checkpoint(tmp_path, TINY)
    key = "transformer.h.0.ln_1.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: np.ones(32, dtype)}))
    assert f"{key} is of type" in refused(tmp_path).what


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", ["transformer.h.1.attn.c_attn.weight", "transformer.wte.weight"])
def test_values_that_are_not_finite(tmp_path, dtype, value, key):
    tensors = hf_tensors(TINY, write_checkpoint(tmp_path, TINY, dtype=dtype))
    tensors[key][-1, -1] = value
    write_tensors(tmp_path, tensors)
    error = refused(tmp_path)
    assert "NaN or infinite" in error.what
    assert error.where == ("qkv_w of layer 1" if "c_attn" in key else "wte")


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_the_largest_finite_values_pass(dtype):
    limit = ml_dtypes.finfo(dtype).max
    tiny = ml_dtypes.finfo(dtype).smallest_subnormal
    checkpoint.check_finite("wte", None, np.array([[limit, -limit, 0.0, -0.0, tiny]], dtype))
