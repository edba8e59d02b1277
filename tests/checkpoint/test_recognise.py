"""What was given in place of a checkpoint is named, and each remedy is tried as it is written."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from adapter_writer import write_adapter
from builders import TINY, small_bpe, write_bpe, write_checkpoint, write_llmc_tokenizer
from command import call
from safetensors.numpy import load_file, save_file
from torch_writer import write_zip

import gpt2cupy
from gpt2cupy import checkpoint
from gpt2cupy.errors import ConfigError, Gpt2CupyError, TokenizerError
from gpt2cupy.tokenizer import Tokenizer

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 548118077\n"
)
PAGE = "<!DOCTYPE html>\n<html><body>Not found</body></html>\n"
CONTENTS = {
    "a pointer of git-lfs": (POINTER.encode(), "git lfs pull"),
    "GGUF": (b"GGUF" + bytes(200), "made of"),
    "a web page": (PAGE.encode(), "the file itself"),
    "a text file": (b"To be, or not to be\xe2\x80\x99\n" * 50, "weights"),
    "a JSON file": (b'{"n_embd": 32}', "config.json"),
    "empty": (b"", "again"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "safetensors"),
}


def refused(path: Path, **options) -> Gpt2CupyError:
    with pytest.raises(Gpt2CupyError) as caught:
        gpt2cupy.load(path, device="cpu", **options)
    return caught.value


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "alone.bin"])
@pytest.mark.parametrize("what", CONTENTS)
def test_in_place_of_weights(tmp_path, name, what):
    data, remedy = CONTENTS[what]
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(data)
    error = refused(tmp_path / name if name == "alone.bin" else tmp_path)
    assert what in error.what and remedy in error.remedy
    assert error.where == str(tmp_path / name)


@pytest.mark.parametrize("form", ["model", "pytorch_model"])
def test_a_shard_that_is_a_pointer(tmp_path, form):
    write_checkpoint(tmp_path, TINY, shards=2)
    shard = tmp_path / "model-00002-of-00002.safetensors"
    shard.write_text(POINTER)
    error = refused(tmp_path)
    assert "git-lfs" in error.what and error.where == str(shard)


@pytest.mark.parametrize(
    "name", ["config.json", "vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"]
)
def test_pointers_in_place_of_small_files(tmp_path, name):
    write_checkpoint(tmp_path, TINY)
    write_bpe(tmp_path, *small_bpe())
    (tmp_path / name).write_text(POINTER)
    error = refused(tmp_path)
    assert "git-lfs" in error.what and "git lfs pull" in error.remedy
    assert isinstance(error, ConfigError if name == "config.json" else TokenizerError)


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_git_lfs_pull_in_the_folder(tmp_path, monkeypatch):
    """The remedy as it is written, with a stand-in for git-lfs that fetches the file."""
    write_checkpoint(tmp_path / "clone", TINY)
    whole = tmp_path / "clone" / "model.safetensors"
    whole.rename(tmp_path / "whole")
    whole.write_text(POINTER)
    script = tmp_path / "git-lfs"
    script.write_text(f'#!/bin/sh\ntest "$1" = pull && cp {tmp_path}/whole model.safetensors\n')
    script.chmod(0o755)
    command = re.search(r"run (git .*?) in its folder", refused(tmp_path / "clone").remedy)[1]
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path / "clone", check=True)
    subprocess.run(command.split(), cwd=tmp_path / "clone", check=True)
    assert checkpoint.open(tmp_path / "clone").config == TINY


def test_weights_under_the_other_formats_name(tmp_path):
    weights = write_checkpoint(tmp_path, TINY)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    arrays = {(name, layer): array for name, layer, array in checkpoint.open(tmp_path).tensors()}
    assert np.array_equal(arrays["wpe", None], weights.wpe)


@pytest.mark.parametrize("config", [True, False], ids=["with config.json", "alone"])
def test_the_folder_of_an_adapter(tmp_path, config):
    write_checkpoint(tmp_path / "base", TINY)
    adapter = write_adapter(
        tmp_path / "an adapter's", base_model_name_or_path=str(tmp_path / "base")
    )
    if config:
        shutil.copy(tmp_path / "base" / "config.json", adapter)
    error = refused(adapter)
    assert "folder of an adapter" in error.what
    code = re.search(r"gpt2cupy\.load\(.*\)", error.remedy)[0]
    with eval(code, {"gpt2cupy": gpt2cupy}) as lm:  # the remedy as it is written
        assert lm.config == TINY


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"base_model_name_or_path": 3}'])
def test_an_adapter_that_names_no_model(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    assert "gpt2cupy.load('gpt2', adapter=" in refused(tmp_path).remedy


@pytest.mark.parametrize(
    "names",
    [
        ["checkpoint", "hparams.json", "encoder.json", "vocab.bpe", "model-500.meta"],
        ["checkpoint", "model.ckpt.index", "model.ckpt.data-00000-of-00001"],
        ["counter", "model-1000.data-00000-of-00001"],
    ],
    ids=str,
)
def test_a_folder_of_gpt_2_simple(tmp_path, names):
    for name in names:
        (tmp_path / name).write_text("x")
    error = refused(tmp_path)
    assert "TensorFlow checkpoint" in error.what and "gpt-2-simple" in error.what
    known = re.search(r"on the hub: ([\w, -]+)\.", error.remedy)[1].split(", ")
    assert set(known) <= set(importlib.import_module("gpt2cupy.checkpoint.resolve").ALIASES)


def test_a_folder_of_gguf(tmp_path):
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    assert "GGUF" in refused(tmp_path).what


@pytest.mark.parametrize("name", ["tf_model.h5", "flax_model.msgpack", "a.gguf", "model.onnx"])
def test_weights_of_other_frameworks(tmp_path, name):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"x")
    assert name in refused(tmp_path).remedy


def test_another_variant_is_named(tmp_path):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    option = re.search(r"variant='\w+'", refused(tmp_path).remedy)[0]
    with eval(f"gpt2cupy.load({str(tmp_path)!r}, {option}, device='cpu')") as lm:
        assert lm.config == TINY
    code, _, err = call("generate", "x", "-m", str(tmp_path), "--device", "cpu")
    assert code == 1 and "--variant fp16" in err


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.bin"])
def test_a_file_of_weights_alone(tmp_path, name):
    write_checkpoint(tmp_path / "model", TINY)
    tensors = {"transformer.wpe.weight": np.zeros((48, 32), np.float32)}
    (save_file if name.endswith("s") else lambda t, p: write_zip(p, t))(tensors, tmp_path / name)
    error = refused(tmp_path / name)
    assert "no config.json beside it" in error.what
    shutil.copy(tmp_path / "model" / "config.json", tmp_path)
    assert "is missing" in refused(tmp_path / name).what, "the remedy leads on"


@pytest.mark.filterwarnings("default")
def test_tensors_left_out_are_named_once_on_stderr(tmp_path):
    write_checkpoint(tmp_path, TINY)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"v_head.weight": np.zeros(3)}, tmp_path / "model.safetensors")
    code, out, err = call("info", "-m", str(tmp_path), "--device", "cpu")
    assert code == 0 and err.count("v_head.weight") == 1 and "v_head" not in out
    assert "gpt2cupy: warning: left out, since they do not enter the logits" in err


def test_a_tokenizer_in_place_of_a_model(tmp_path):
    path = tmp_path / "gpt2_tokenizer.bin"
    write_llmc_tokenizer(path, [bytes([i]) for i in range(256)] + [b"<|endoftext|>"], 256)
    error = refused(path)
    assert "tokenizer of llm.c, not a model" in error.what and "tokenizer=" in error.remedy


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"To be, or not to be.\n" * 100, "a text file, not a tokenizer"),
        (b"", "neither JSON nor llm.c"),
        (bytes(100), "neither JSON nor llm.c"),
        (b"GGUF" + bytes(99), "neither JSON nor llm.c"),
        (b"PK\3\4" + bytes(99), "a file of weights"),
        (b"[1, 2]", "not a JSON object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_file_as_tokenizer(tmp_path, content, says):
    (tmp_path / "words").write_bytes(content)
    error = refused("shakespeare", tokenizer=str(tmp_path / "words"))
    assert says in error.what and str(tmp_path) in error.where


def test_the_remedy_for_a_text_file_as_tokenizer(tmp_path):
    write_bpe(tmp_path, *small_bpe())
    with pytest.raises(TokenizerError, match="text file") as caught:
        Tokenizer.from_path(tmp_path / "merges.txt")
    assert "the folder that holds vocab.json and merges.txt" in caught.value.remedy
    assert Tokenizer.from_path(tmp_path).vocab_size == 263


def test_the_remedy_for_a_vocabulary_as_tokenizer(tmp_path):
    write_bpe(tmp_path, *small_bpe())
    with pytest.raises(TokenizerError, match="a vocabulary alone") as caught:
        Tokenizer.from_path(tmp_path / "vocab.json")
    assert "the folder that holds it" in caught.value.remedy


def test_the_remedy_for_a_token_before_the_text(tmp_path):
    write_bpe(tmp_path, *small_bpe())
    options = {"add_bos_token": True, "pad_token": "<p>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    with pytest.raises(TokenizerError, match="add_bos_token") as caught:
        Tokenizer.from_path(tmp_path)
    assert "Set it to false and write the token into the prompt" in caught.value.remedy
    options["add_bos_token"] = False
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(options))
    found = Tokenizer.from_path(tmp_path).encode("<|endoftext|>a", allowed_special="all")
    assert found == [262, 64]
