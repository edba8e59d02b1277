"""pytorch_model.bin and ckpt.pt: read without PyTorch, and nothing of what they contain is run."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from builders import BFLOAT16, TINY, hf_tensors, write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
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
from gpt2cupy.checkpoint import pickle_reader, torch_file
from gpt2cupy.checkpoint.pickle_reader import MAX_BYTES, PickleRefusedError, Reader
from gpt2cupy.errors import CheckpointError, Gpt2CupyError
from gpt2cupy.weights import Weights

UNTIED = dataclasses.replace(TINY, tie_word_embeddings=False)
GELU = dataclasses.replace(TINY, activation_function="gelu", bos_token_id=None, eos_token_id=None)
DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BFLOAT16}


def loaded(path: Path) -> dict[str, np.ndarray]:
    found = checkpoint.open(path)
    weights = Weights.from_tensors(found.config, found.tensors(finite=True), found.dtype)
    return dict(weights.items())


def same(path: Path, weights: Weights) -> bool:
    mine = loaded(path)
    return all(
        np.array_equal(mine[name].astype(weights.dtype), array.astype(weights.dtype))
        for name, array in weights.items()
    )


def folder_of(tmp_path: Path, config=TINY, dtype=np.float32) -> tuple[Weights, dict]:
    weights = write_checkpoint(tmp_path, config, 0, dtype)
    (tmp_path / "model.safetensors").unlink()
    return weights, hf_tensors(config, weights)


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


# -- pickles that would do something -------------------------------------------------------------


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def protocol2(value: object) -> bytes:
    return pickle.dumps(value, 2)


_OS = protocol2(Evil(os.system, "touch pwned"))
MALICIOUS = {
    "os.system": _OS,
    "eval": protocol2(Evil(eval, "open('pwned', 'w')")),
    "exec": protocol2(Evil(exec, "open('pwned', 'w')")),
    "getattr": protocol2(Evil(getattr, "", "join")),
    "open": protocol2(Evil(io.open, "pwned", "w")),
    "import": b"\x80\x02c__builtin__\n__import__\nX\x02\0\0\0os\x85R.",
    "numpy.load": protocol2(Evil(np.load, "pwned")),
    "numpy array": protocol2(np.zeros(3)),
    "numpy scalar": protocol2(np.float32(3)),
    "deep in a value": protocol2({"model": [({"x": Evil(os.system, "touch pwned")},)]}),
    "a class of ours": b"\x80\x02cgpt2cupy.cache\nKVCache\n)R.",
    "torch.load": b"\x80\x02ctorch.serialization\nload\nX\x01\0\0\0x\x85R.",
    "torch._utils, another function": b"\x80\x02ctorch._utils\n_import_dotted_name\n)R.",
    "a name with dots": b"\x80\x02ctorch\n_utils._rebuild_tensor_v2.__globals__\n.",
    "a storage that is called": b"\x80\x02ctorch\nFloatStorage\n)R.",
    "an OrderedDict with arguments": b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
    "OrderedDict as an object": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "INST": b"\x80\x02(X\x02\0\0\0idios\nsystem\n.",
    "OBJ": b"\x80\x02(ccollections\nOrderedDict\no.",
    "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x01.",
    "EXT4": b"\x80\x02\x84\x01\0\0\0.",
    "PERSID": b"\x80\x02Pstorage\n.",
    "a persistent id that is text": b"\x80\x02X\x01\0\0\0xQ.",
    "a persistent id of a module": b"\x80\x02(X\x06\0\0\0modulectorch\nFloatStorage\nNNNtQ.",
    "STACK_GLOBAL": b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93X\x01\0\0\0a\x85R.",
    "STACK_GLOBAL of protocol 4": pickle.dumps(Evil(os.system, "touch pwned"), 4),
    "protocol 0": pickle.dumps(Evil(os.system, "touch pwned"), 0),
    "protocol 3": pickle.dumps({"a": 1}, 3),
    "protocol 5": pickle.dumps({"a": bytearray(5)}, 5),
    "protocol twice": b"\x80\x02\x80\x04N.",
    "no protocol": b"N.",
    "BUILD of a slot": b"\x80\x02ccollections\nOrderedDict\n)RN}X\x01\0\0\0aK\1s\x86b.",
    "BUILD of an attribute": b"\x80\x02ccollections\nOrderedDict\n)R}X\x05\0\0\0itemsK\1sb.",
    "BUILD of a dict": b"\x80\x02}}X\x09\0\0\0_metadata}sb.",
    "BUILD of a name": b"\x80\x02ccollections\nOrderedDict\n}b.",
    "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a huge integer": b"\x80\x02\x8a\xff" + bytes(255) + b".",
    "a text longer than the file": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a text that is not UTF-8": b"\x80\x02X\x01\0\0\0\xff.",
    "a key that is a tuple": b"\x80\x02}K\1\x85K\1s.",
    "a key that is a list": b"\x80\x02}]K\1s.",
    "a key that is a float": b"\x80\x02}G" + bytes(8) + b"K\1s.",
    "values left over": b"\x80\x02NN.",
    "a mark left over": b"\x80\x02(N.",
    "no value": b"\x80\x02.",
    "below a mark": b"\x80\x02N(\x85t.",
    "no mark": b"\x80\x02Nt.",
    "odd items": b"\x80\x02}(K\1u.",
    "append to a dict": b"\x80\x02}K\1a.",
    "append to a name": b"\x80\x02ccollections\nOrderedDict\nK\1a.",
    "a memo that is not there": b"\x80\x02h\x05.",
    "a long memo that is not there": b"\x80\x02j\xff\xff\xff\xff.",
    "POP": b"\x80\x02NN0.",
    "DUP": b"\x80\x02N2\x86.",
    "no end": b"\x80\x02}",
    "a name without end": b"\x80\x02cos",
    "a name too long": b"\x80\x02c" + b"a" * 500 + b"\nb\n.",
    "empty": b"",
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("data", MALICIOUS.values(), ids=MALICIOUS)
def test_nothing_is_run(tmp_path, monkeypatch, data, write):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PickleRefusedError):
        Reader(memoryview(data)).read()
    folder_of(tmp_path)
    write(tmp_path / "pytorch_model.bin", {}, pickled=data)
    with pytest.raises(CheckpointError, match=r"torch\.save") as caught:
        checkpoint.open(tmp_path)
    assert caught.value.remedy and "pytorch_model.bin" in caught.value.where
    assert not (tmp_path / "pwned").exists()


def test_the_name_that_is_asked_for_is_said():
    with pytest.raises(PickleRefusedError, match=r"'posix\.system'"):
        Reader(memoryview(_OS)).read()


# Each with as many opcodes as one of ten megabytes would have, divided by ten as the limit is.
BOMBS = {
    "deep nesting": b"\x80\x02N" + b"\x85" * 35_000 + b".",
    "deep lists": b"\x80\x02" + b"](" * 15_000,
    "opcodes without end": b"\x80\x02(" + b"}" * 1_000_000,
    "a memo of everything": b"\x80\x02" + b"}r\1\2\3\4" * 15_000,
    "references to references": b"\x80\x02]q\0(" + b"h\0" * 39_000 + b"e.",
    "doubling": b"\x80\x02N" + b"".join(b"q%c(h%ch%ct" % (i, i, i) for i in range(99)) + b".",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs_cost_little(data, monkeypatch):
    monkeypatch.setattr(pickle_reader, "_MAX_OPCODES", 40_000)
    tracemalloc.start()
    try:
        Reader(memoryview(data)).read()
    except PickleRefusedError as error:
        str(error).encode()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 6 << 20


def test_a_pickle_is_bounded_whatever_the_file():
    with pytest.raises(PickleRefusedError, match="cut off"):
        Reader(memoryview(b"\x80\x02X" + struct.pack("<I", MAX_BYTES) + bytes(MAX_BYTES))).read()


def storage_pickle(**changes: bytes) -> bytes:
    """One tensor of 4 float32, with parts replaced."""
    parts = {
        "word": Pickled("storage").data[2:-1],
        "kind": b"ctorch\nFloatStorage\n",
        "key": Pickled("0").data[2:-1],
        "device": Pickled("cpu").data[2:-1],
        "count": b"K\x04",
        "offset": b"K\0",
        "shape": b"K\2K\2\x86",
        "strides": b"K\2K\1\x86",
    } | changes
    storage = b"(" + b"".join(list(parts.values())[:5]) + b"tQ"
    tail = b"".join(list(parts.values())[5:]) + b"\x89ccollections\nOrderedDict\n)R"
    return b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(" + storage + tail + b"tRs."


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": b"K\1"},
        {"offset": b"J\xff\xff\xff\xff"},
        {"offset": b"\x8a\x10" + b"\xff" * 15 + b"\x7f"},
        {"offset": b"\x88"},
        {"shape": b"K\3K\2\x86"},
        {"shape": b"K\2\x85"},
        {"shape": b"]"},
        {"shape": b"J\xff\xff\xff\xffK\2\x86"},
        {"shape": b"(" + b"K\1" * 9 + b"t", "strides": b"(" + b"K\1" * 9 + b"t"},
        {"strides": b"K\4K\1\x86"},
        {"strides": b"J\xfe\xff\xff\xffK\1\x86"},
        {"strides": b"N"},
        {"count": b"\x8a\x08" + b"\xff" * 7 + b"\x7f"},
        {"count": b"J\xff\xff\xff\xff"},
        {"count": b"K\3"},
        {"count": b"K\5"},
        {"kind": b"ctorch\nDoubleStorage\n"},
        {"kind": b"ccollections\nOrderedDict\n"},
        {"kind": b"N"},
        {"key": b"K\0"},
        {"key": Pickled("../data.pkl").data[2:-1]},
        {"word": Pickled("module").data[2:-1]},
    ],
    ids=str,
)
def test_tensors_outside_their_storage(tmp_path, changes):
    path = tmp_path / "file.bin"
    memory = np.arange(4, dtype=np.float32)
    write_zip(path, {"a": memory.reshape(2, 2)}, pickled=storage_pickle())
    entry = torch_file.read(path).entries(torch_file.read(path).value)["a"]
    assert (entry.shape, entry.strides) == ((2, 2), (2, 1))
    write_zip(path, {"a": memory.reshape(2, 2)}, pickled=storage_pickle(**changes))
    with pytest.raises(CheckpointError):
        torch_file.read(path)


# -- archives that are wrong ---------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path) -> Path:
    write_zip(tmp_path / "file.bin", {"a": np.arange(6, dtype=np.float32)})
    torch_file.read(tmp_path / "file.bin")
    return tmp_path / "file.bin"


def refused(path: Path, match: str = ".") -> None:
    with pytest.raises(CheckpointError, match=match):
        torch_file.read(path)


def test_compressed_entries(archive):
    write_zip(archive, {"a": np.zeros(10**6, np.float32)}, method=zipfile.ZIP_DEFLATED)
    assert archive.stat().st_size < 10_000, "a bomb"
    refused(archive, "compressed")


def patched(path: Path, signature: bytes, place: int, value: bytes, which: int = 0) -> None:
    """Bytes changed behind the given occurrence of a signature."""
    data = bytearray(path.read_bytes())
    at = -1
    for _ in range(which + 1):
        at = data.index(signature, at + 1)
    data[at + place : at + place + len(value)] = value
    path.write_bytes(data)


DIRECTORY, LOCAL, END = b"PK\1\2", b"PK\3\4", b"PK\5\6"
_HUGE = b"\xff\xff\xff\x7f"


@pytest.mark.parametrize(
    ("signature", "place", "value", "which"),
    [
        (DIRECTORY, 8, b"\1\0", 0),  # encrypted
        (DIRECTORY, 10, b"\x08\0", 0),  # deflated
        (DIRECTORY, 24, _HUGE, 2),  # size
        (DIRECTORY, 20, b"\1\0\0\0", 2),  # packed size
        (DIRECTORY, 42, _HUGE, 2),  # offset behind the end
        (DIRECTORY, 42, b"\0\0\0\0", 2),  # offset of another entry
        (DIRECTORY, 28, b"\xff\xff", 0),  # length of the name
        (DIRECTORY, 46, b"archive/datX.pkl", 0),  # the name
        (DIRECTORY, 0, b"PK\1\1", 1),
        (DIRECTORY, 34, b"\1\0", 0),  # another disk
        (LOCAL, 0, b"PK\3\3", 2),
        (LOCAL, 30, b"archive/dada.pkl", 0),
        (LOCAL, 26, b"\xff\xff", 0),
        (LOCAL, 28, b"\xff\xff", 2),  # length of the extra field
        (END, 10, b"\x03\0", 0),  # entries
        (END, 10, b"\xff\x7f", 0),
        (END, 12, b"\1\0\0\0", 0),  # length of the directory
        (END, 12, _HUGE, 0),
        (END, 16, b"\0\0\0\0", 0),  # its place
        (END, 16, _HUGE, 0),
        (END, 20, b"\5\0", 0),  # length of the comment
        (END, 0, b"PK\5\5", 0),
        (END, 4, b"\1\0", 0),
    ],
)
def test_wrong_directories(archive, signature, place, value, which):
    patched(archive, signature, place, value, which)
    refused(archive)


def test_entries_that_overlap_or_stand_twice(tmp_path):
    path = tmp_path / "file.bin"
    for second in ("archive/data/1", "archive/data.pkl"):
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", Pickled({}).data)
            file.writestr("archive/data/0", bytes(64))
            if second.endswith("pkl"):
                with pytest.warns(UserWarning, match="Duplicate"):
                    file.writestr(second, Pickled({}).data)
            else:
                # The same bytes under two names: the second inside the first.
                inner = LOCAL + bytes(22) + struct.pack("<2H", len(second), 0) + second.encode()
                file.writestr("archive/data/2", inner + bytes(8))
                file.writestr(second, bytes(8))
        if not second.endswith("pkl"):
            at = path.read_bytes().index(inner)
            patched(path, DIRECTORY, 42, struct.pack("<I", at), 3)
        refused(path, "twice" if second.endswith("pkl") else "overlap")


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["data.pkl"],
        ["a/data.pkl", "b/data.pkl"],
        ["a/b/data.pkl"],
        ["archive/data.pkl", "archive/constants.pkl"],
    ],
    ids=str,
)
def test_archives_of_something_else(tmp_path, names):
    with zipfile.ZipFile(tmp_path / "file.bin", "w") as file:
        for name in [*names, "other"]:
            file.writestr(name, Pickled({}).data)
    refused(tmp_path / "file.bin")


def test_numbers_in_big_endian_order(archive):
    data = archive.read_bytes().replace(b"little", b"\0\0\0big")
    archive.write_bytes(data)
    refused(archive, "big-endian")


def test_a_directory_beyond_four_gigabytes(tmp_path):
    """zip64 as torch writes it for large files, in a file with a hole."""
    path = tmp_path / "file.bin"
    made = Pickled({"a": np.zeros(2, np.float32)})
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", made.data)
    tail = path.read_bytes()
    local, rest = tail[: tail.index(DIRECTORY)], tail[tail.index(DIRECTORY) :]
    entry, hole = rest[: rest.index(END)], 5 << 30
    name = b"archive/data/0"
    data = LOCAL + bytes(22) + struct.pack("<2H", len(name), 0) + name + bytes(8)
    extra = struct.pack("<2H3Q", 1, 24, 8, 8, hole)
    wide = entry[:4] + bytes(16) + b"\xff" * 8 + struct.pack("<3H", len(name), len(extra), 0)
    wide += bytes(8) + b"\xff" * 4 + name + extra
    start = hole + len(data)
    end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, 2, 2, len(entry + wide), start)
    place = struct.pack("<4sIQI", b"PK\6\7", 0, start + len(entry + wide), 1)
    end = END + struct.pack("<4H2IH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    with path.open("wb") as file:
        file.write(local)
        file.seek(hole)
        file.write(data + entry + wide + end64 + place + end)
    found = torch_file.read(path)
    assert found.places["0"] == (hole + 30 + len(name), 8)
    path.unlink()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@pytest.mark.parametrize("keep", [0, 1, 3, 100, -1, -30])
def test_files_that_are_cut_off(tmp_path, write, keep):
    folder_of(tmp_path)
    path = tmp_path / "pytorch_model.bin"
    write(path, {"a": np.arange(60, dtype=np.float32)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError):
        checkpoint.open(tmp_path)


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
@settings(max_examples=200)
@given(data=st.data())
def test_damaged_files_raise_only_our_errors(tmp_path_factory, write, data):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / "ckpt.pt"
    config = dataclasses.replace(GELU, n_embd=4, vocab_size=9, n_positions=4, n_layer=1)
    write(path, nanogpt(config, nanogpt_tensors(config, Weights.random(config, 0))))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        end = data.draw(st.sampled_from([16, 400, len(whole)]))
        place = data.draw(st.integers(0, end))
        size = data.draw(st.sampled_from([0, 1, 4, 8, 2000]))
        whole[place : place + size] = data.draw(st.binary(max_size=8))
    path.write_bytes(whole)
    try:
        loaded(path)
    except Gpt2CupyError as error:
        assert error.remedy


@settings(max_examples=300)
@given(st.binary(max_size=60), st.data())
def test_any_opcodes(tail, data):
    """Opcodes in any order, most of them of the list."""
    opcodes = b"(})]Nt\x85\x86\x87suaeq\0h\0RbQ\x88J\0\0\0\0K\1"
    known = st.sampled_from([bytes([code]) for code in opcodes])
    words = ("collections\nOrderedDict", "torch\nFloatStorage")
    words += tuple(f"torch._utils\n_rebuild_{name}" for name in ("tensor_v2", "parameter"))
    names = st.sampled_from([b"X\1\0\0\0a", *(f"c{word}\n".encode() for word in words)])
    parts = data.draw(st.lists(st.one_of(known, names), max_size=30))
    try:
        Reader(memoryview(b"\x80\x02" + b"".join(parts) + tail)).read()
    except PickleRefusedError as error:
        str(error).encode()
