"""Pickles of checkpoints: nothing is run, and what costs too much is refused."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc

import numpy as np
import pytest
from torch_folder import folder_of
from torch_writer import (
    WRITERS,
    Pickled,
    write_zip,
)

from gpt2cupy import checkpoint
from gpt2cupy.checkpoint import pickle_reader, torch_file
from gpt2cupy.checkpoint.pickle_reader import MAX_BYTES, PickleRefusedError, Reader
from gpt2cupy.errors import CheckpointError


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
