"""pytorch_model.bin and ckpt.pt: what is read of them, without PyTorch."""

from __future__ import annotations

import dataclasses
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from builders import BFLOAT16, TINY, hf_tensors, write_checkpoint
from torch_folder import GELU, folder_of, loaded
from torch_writer import (
    WRITERS,
    Pickled,
    nanogpt,
    nanogpt_tensors,
    write_bins,
    write_legacy,
    write_zip,
)

import gpt2cupy
from gpt2cupy import checkpoint
from gpt2cupy.errors import CheckpointError, Gpt2CupyError
from gpt2cupy.weights import Weights

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}


def same(path: Path, weights: Weights) -> bool:
    mine = loaded(path)
    return all(
        np.array_equal(mine[name].astype(weights.dtype), array.astype(weights.dtype))
        for name, array in weights.items()
    )


# -- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_either_container(tmp_path, config, dtype, write):
    weights, tensors = folder_of(tmp_path, config, dtype)
    write(tmp_path / "pytorch_model.bin", tensors)
    assert same(tmp_path, weights)
    found = checkpoint.open(tmp_path)
    assert (found.dtype, found.config) == (dtype, config)
    for _, _, array in found.tensors():
        assert not array.flags.writeable and not array.flags.owndata


def test_shards(tmp_path):
    weights, tensors = folder_of(tmp_path)
    write_bins(tmp_path, tensors, 3)
    assert same(tmp_path, weights)
    (tmp_path / "pytorch_model-00002-of-00003.bin").unlink()
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(tmp_path)
    assert "00002-of-00003" in caught.value.where


def test_safetensors_goes_first(tmp_path):
    weights = write_checkpoint(tmp_path, TINY)
    write_zip(tmp_path / "pytorch_model.bin", hf_tensors(TINY, Weights.random(TINY, 1)))
    assert same(tmp_path, weights)


@pytest.mark.parametrize("inner", ["state_dict", "model_state_dict", "module"])
def test_weights_inside_of_what_a_trainer_saved(tmp_path, inner):
    weights, tensors = folder_of(tmp_path)
    write_zip(tmp_path / "pytorch_model.bin", {"epoch": 3, inner: tensors})
    assert same(tmp_path, weights)


def test_views_inside_a_storage_and_transposed_ones(tmp_path):
    weights, tensors = folder_of(tmp_path)
    key = "transformer.h.0.mlp.c_fc.weight"
    memory = np.concatenate([np.zeros(7, np.float32), tensors[key].T.reshape(-1)])
    tensors[key] = memory[7:].reshape(tensors[key].shape[::-1]).T
    key = "transformer.wpe.weight"
    memory = np.concatenate([np.zeros((3, 32), np.float32), tensors[key]])
    tensors[key] = memory[3:]
    assert all(tensors[key].base is not None for key in (key, "transformer.h.0.mlp.c_fc.weight"))
    write_zip(tmp_path / "pytorch_model.bin", tensors)
    assert same(tmp_path, weights)


@pytest.mark.parametrize("view", [lambda a: a[:, ::2], lambda a: a[::-1]], ids=["steps", "back"])
def test_views_that_are_not_dense(tmp_path, view):
    _, tensors = folder_of(tmp_path)
    key = "transformer.wpe.weight"
    tensors[key] = view(np.zeros((TINY.n_positions, 64 if "::2" else 32), np.float32))
    write_zip(tmp_path / "pytorch_model.bin", tensors)
    with pytest.raises(CheckpointError, match=r"contiguous|shape|unknown form"):
        checkpoint.open(tmp_path)


def test_attributes_of_a_state_dict_are_dropped(tmp_path):
    """As torch.save writes the OrderedDict of model.state_dict()."""
    weights, tensors = folder_of(tmp_path)
    plain = Pickled(tensors)
    ordered = b"\x80\x02ccollections\nOrderedDict\n)R" + plain.data[3:-1]
    state = Pickled({"_metadata": {"": {"version": 1}}}).data[2:-1]
    write_zip(tmp_path / "pytorch_model.bin", tensors, pickled=ordered + state + b"b.")
    assert same(tmp_path, weights)


def test_reading_maps_and_does_not_load(tmp_path):
    config = dataclasses.replace(TINY, vocab_size=50_000, n_embd=64)
    _, tensors = folder_of(tmp_path, config)
    write_legacy(tmp_path / "pytorch_model.bin", tensors)
    assert (tmp_path / "pytorch_model.bin").stat().st_size > 12 << 20
    del tensors
    tracemalloc.start()
    for _ in checkpoint.open(tmp_path).tensors(finite=True):
        pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_a_gpu(tmp_path, dtype):
    """Tensors at odd addresses of the old container, and transposed ones, reach the device."""
    _, tensors = folder_of(tmp_path, TINY, DTYPES[dtype])
    key = "transformer.h.0.mlp.c_fc.weight"
    tensors[key] = np.ascontiguousarray(tensors[key].T).T
    write_legacy(tmp_path / "pytorch_model.bin", tensors)
    expected = loaded(tmp_path)
    model = gpt2cupy.GPT2.from_pretrained(tmp_path, device="cuda", dtype=dtype)
    for name, array in model.weights.items():
        assert np.array_equal(array.get(), expected[name].astype(array.dtype.name)), name


# -- nanoGPT -------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_nanogpt(tmp_path, prefix, bias, write):
    weights = Weights.random(GELU, 0)
    tensors = {prefix + k: v for k, v in nanogpt_tensors(GELU, weights, bias=bias).items()}
    write(tmp_path / "ckpt.pt", nanogpt(GELU, tensors, bias=bias))
    assert checkpoint.open(tmp_path / "ckpt.pt").config == GELU
    mine = loaded(tmp_path / "ckpt.pt")
    for name, array in weights.items():
        zero = name.endswith("_b") and not bias
        assert np.array_equal(mine[name], np.zeros_like(array) if zero else array), name
    assert loaded(tmp_path).keys() == mine.keys(), "its folder will do"
    assert checkpoint.open(tmp_path).path == tmp_path, "where a tokenizer may lie"


def test_a_bias_missing_from_a_run_with_biases(tmp_path):
    tensors = nanogpt_tensors(GELU, Weights.random(GELU, 0))
    del tensors["transformer.h.1.mlp.c_fc.bias"]
    write_zip(tmp_path / "ckpt.pt", nanogpt(GELU, tensors))
    with pytest.raises(CheckpointError, match=r"h\.1\.mlp\.c_fc\.bias is missing"):
        checkpoint.open(tmp_path / "ckpt.pt")


def test_a_padded_vocabulary_is_cut(tmp_path):
    padded = dataclasses.replace(GELU, vocab_size=50304, n_embd=8)
    weights = Weights.random(padded, 0)
    # Were the padding a part of the vocabulary, it would be what is sampled.
    weights.wte[50257:50304] = weights.lnf_b[:] = 9
    write_zip(tmp_path / "ckpt.pt", nanogpt(padded, nanogpt_tensors(padded, weights)))
    with gpt2cupy.load(tmp_path / "ckpt.pt", device="cpu") as lm:
        assert lm.config.vocab_size == 50257
        assert (lm.config.bos_token_id, lm.config.eos_token_id) == (50256, 50256)
        assert lm([[1, 2]]).shape == (1, 2, 50257)
        assert max(lm.generate([5], max_new_tokens=4, eos_token_id=-1).tokens) < 50257


@pytest.mark.parametrize("change", [{"n_head": 3}, {"n_embd": "32"}, {"vocab_size": None}], ids=str)
def test_impossible_sizes(tmp_path, change):
    write_zip(tmp_path / "ckpt.pt", nanogpt(GELU, {}, **change))
    with pytest.raises(Gpt2CupyError, match="nanoGPT"):
        checkpoint.open(tmp_path / "ckpt.pt")
