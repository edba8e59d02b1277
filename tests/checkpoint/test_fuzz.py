"""Damaged checkpoints and tokenizers load or raise this package's errors, in little memory."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from builders import (
    small_bpe,
    tokenizer_json,
    write_bpe,
    write_checkpoint,
    write_llmc,
    write_llmc_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from torch_writer import write_bins

from gpt2cupy import GPT2Config, checkpoint
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.tokenizer import Tokenizer
from gpt2cupy.weights import Weights

CONFIG = GPT2Config(vocab_size=9, n_positions=4, n_embd=4, n_layer=1, n_head=2)
MEMORY = 16 << 20
# Values that a loader may trip over, in the place of any value of a JSON file.
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**30, 1e308, float("nan")]),
    st.floats(),
    st.text(max_size=5),
    st.lists(st.integers(-2, 2**40), max_size=3),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=2),
)


def survives(path: Path) -> None:
    """Load all the way; only our errors may come, and they must be printable."""
    tracemalloc.start()
    try:
        found = checkpoint.open(path)
        Weights.from_tensors(found.config, found.tensors(finite=True), np.float32)
    except Gpt2CupyError as error:
        assert error.remedy
        str(error).encode()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


def replaced(tree: object, path: list[object], value: object) -> object:
    """The JSON tree with the value at a path replaced."""
    if not path:
        return value
    copy = tree.copy()
    copy[path[0]] = replaced(copy[path[0]], path[1:], value)
    return copy


def paths(tree: object) -> list[list[object]]:
    """Every place in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
    places = [[]]
    for key, part in inner:
        places += [
            [key, *rest] for rest in (paths(part) if isinstance(part, dict | list) else [[]])
        ]
    return places


@st.composite
def damage(draw, whole: bytes) -> bytes:
    """A few bytes cut out, put in or changed, mostly near the beginning."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        end = draw(st.sampled_from([16, 200, len(data)]))
        place = draw(st.integers(0, min(end, len(data))))
        data[place : place + draw(st.sampled_from([0, 1, 4, 8, 2000]))] = draw(
            st.binary(max_size=8)
        )
    return bytes(data)


@pytest.fixture(scope="module", params=["single", "shards", "bin"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz")
    write_checkpoint(path, CONFIG, shards=2 if request.param == "shards" else 1)
    if request.param == "bin":
        write_bins(path, load_file(path / "model.safetensors"), 2)
        (path / "model.safetensors").unlink()
    return path


@pytest.fixture(scope="module")
def llmc(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "model.bin"
    write_llmc(path, CONFIG, Weights.random(CONFIG, 0))
    return path


def check(path: Path, changed: bytes, opened: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(changed)
    try:
        survives(opened)
    finally:
        path.write_bytes(whole)


@settings(max_examples=150)
@given(st.data())
def test_damaged_bytes(folder, data):
    path = data.draw(st.sampled_from(sorted(folder.iterdir())))
    check(path, data.draw(damage(path.read_bytes())), folder)


@settings(max_examples=150)
@given(st.data())
def test_damaged_llmc(llmc, data):
    check(llmc, data.draw(damage(llmc.read_bytes())), llmc)


@settings(max_examples=150)
@given(st.data())
def test_odd_values_in_json(folder, data):
    path = data.draw(st.sampled_from(sorted(folder.glob("*.json"))))
    tree = json.loads(path.read_bytes())
    place = data.draw(st.sampled_from(paths(tree)))
    changed = replaced(tree, place, data.draw(values))
    check(path, json.dumps(changed).encode(), folder)


@settings(max_examples=150)
@given(st.data())
def test_odd_values_in_a_header(folder, data):
    path = next(iter(sorted(folder.glob("*.safetensors"))), None)
    if path is None:
        return
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    tree = json.loads(whole[8 : 8 + size])
    place = data.draw(st.sampled_from(paths(tree)))
    header = json.dumps(replaced(tree, place, data.draw(values))).encode()
    check(path, struct.pack("<Q", len(header)) + header + whole[8 + size :], folder)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """Tokenizers of every form, each in a place of its own."""
    folder = tmp_path_factory.mktemp("words")
    vocab, merges = small_bpe()
    write_bpe(folder / "pair", vocab, merges)
    template = {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}]}
    for name, changes in [("old", {}), ("new", {"post_processor": template})]:
        (folder / name).mkdir()
        text = json.dumps(tokenizer_json(vocab, merges, **changes))
        names = {"pad_token": "<|pad|>", "additional_special_tokens": ["<x>"]}
        (folder / name / "special_tokens_map.json").write_text(json.dumps(names))
        (folder / name / "tokenizer.json").write_text(text)
        added = {"9000": {"content": "<|pad|>", "special": True}}
        options = {"eos_token": {"content": "<|endoftext|>"}, "added_tokens_decoder": added}
        (folder / name / "tokenizer_config.json").write_text(json.dumps(options))
    tokens = [bytes([byte]) for byte in range(256)] + [b"<|endoftext|>"]
    write_llmc_tokenizer(folder / "tokenizer.bin", tokens, 256)
    return folder


def reads_tokens(path: Path) -> None:
    """The same for tokenizers, which must encode what they were read from."""
    tracemalloc.start()
    try:
        tokenizer = Tokenizer.from_path(path)
        text = " the aaaa é"
        assert tokenizer.decode(tokenizer.encode(text)) == text
    except Gpt2CupyError as error:
        assert error.remedy
        str(error).encode()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


def check_tokens(path: Path, changed: bytes) -> None:
    whole = path.read_bytes()
    path.write_bytes(changed)
    try:
        reads_tokens(path if path.suffix == ".bin" else path.parent)
    finally:
        path.write_bytes(whole)


@pytest.mark.filterwarnings("ignore:unknown options")
@settings(max_examples=200)
@given(st.data())
def test_damaged_tokenizers(words, data):
    path = data.draw(st.sampled_from(sorted(p for p in words.rglob("*") if p.is_file())))
    check_tokens(path, data.draw(damage(path.read_bytes())))


@pytest.mark.filterwarnings("ignore:unknown options")
@settings(max_examples=300)
@given(st.data())
def test_odd_values_in_tokenizers(words, data):
    path = data.draw(st.sampled_from(sorted(words.rglob("*.json"))))
    tree = json.loads(path.read_bytes())
    # First a part of the file: a vocabulary's hundreds of places are alike.
    part = data.draw(st.sampled_from(list(tree)))
    inner = paths(tree[part]) if isinstance(tree[part], dict | list) else [[]]
    place = [part, *data.draw(st.sampled_from([p for p in inner if "vocab" not in p[:-1]]))]
    changed = replaced(tree, place, data.draw(values))
    check_tokens(path, json.dumps(changed).encode())
