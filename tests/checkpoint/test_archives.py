"""Zip archives of checkpoints that are damaged, hostile or of something else."""

from __future__ import annotations

import dataclasses
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_folder import GELU, folder_of, loaded
from torch_writer import (
    WRITERS,
    Pickled,
    nanogpt,
    nanogpt_tensors,
    write_zip,
)

from gpt2cupy import checkpoint
from gpt2cupy.checkpoint import torch_file
from gpt2cupy.checkpoint.pickle_reader import PickleRefusedError, Reader
from gpt2cupy.errors import CheckpointError, Gpt2CupyError
from gpt2cupy.weights import Weights


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
