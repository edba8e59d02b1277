"""Checkpoint folders whose files are damaged, hostile, missing or not to be read."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from builders import TINY, write_checkpoint
from refused_checkpoint import MEMORY, SHARD, refused

from gpt2cupy import checkpoint
from gpt2cupy.errors import ConfigError, Gpt2CupyError, InputError

# -- files that are wrong ------------------------------------------------------------------------


def with_header(folder: Path, header: object, size: int | None = None, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = struct.pack("<Q", len(text) if size is None else size)
    (folder / "model.safetensors").write_bytes(length + text + data)


@pytest.mark.parametrize("size", [0, 1, 2**27, 2**40, 2**63, 2**64 - 1])
def test_a_hostile_header_length(tmp_path, size):
    write_checkpoint(tmp_path, TINY)
    with_header(tmp_path, {}, size=size)
    tracemalloc.start()
    assert "safetensors" in refused(tmp_path).what
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEMORY


def test_overlapping_offsets(tmp_path):
    write_checkpoint(tmp_path, TINY)
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    with_header(tmp_path, {"a": entry, "b": entry}, data=bytes(16))
    refused(tmp_path)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**62]},
        {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]},
        {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]},
        {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**62, 2**62], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4]},
        {},
        [],
        None,
    ],
    ids=str,
)
def test_impossible_headers(tmp_path, entry):
    write_checkpoint(tmp_path, TINY)
    with_header(tmp_path, {"wpe.weight": entry}, data=bytes(16))
    refused(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_headers_that_are_not_json_objects(tmp_path, text):
    write_checkpoint(tmp_path, TINY)
    with_header(tmp_path, text)
    refused(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file(tmp_path, keep):
    write_checkpoint(tmp_path, TINY)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refused(tmp_path).where


def test_a_file_that_is_too_long(tmp_path):
    write_checkpoint(tmp_path, TINY)
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(bytes(16))
    refused(tmp_path)


def test_broken_config(tmp_path):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "config.json").write_text('{"n_embd": 32,')
    assert "config.json" in refused(tmp_path, ConfigError).where
    (tmp_path / "config.json").unlink()
    assert "config.json" in refused(tmp_path, ConfigError).where


def test_no_weights(tmp_path):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "model.safetensors").rename(tmp_path / "flax_model.msgpack")
    error = refused(tmp_path)
    assert "no model.safetensors and no pytorch_model.bin" in error.what
    assert "flax_model.msgpack" in error.remedy


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", [".", "model.safetensors", "config.json"])
def test_what_may_not_be_read(tmp_path, name):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / name).chmod(0)
    try:
        assert "ermission denied" in refused(tmp_path, Gpt2CupyError).what
    finally:
        (tmp_path / name).chmod(0o700)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("", ["open", "stat"]),
        ("config.json", ["open"]),
        ("model.safetensors", ["open"]),
        ("model.safetensors", ["stat"]),
    ],
)
def test_what_the_system_refuses(tmp_path, monkeypatch, name, calls):
    """The same for whoever runs tests as root: a folder, or a file of it."""
    write_checkpoint(tmp_path, TINY)
    prefix = f"{tmp_path}/{name}"

    def guarded(call):
        def guard(path, *args, **kwargs):
            if str(path).startswith(prefix):
                raise PermissionError(13, "Permission denied", str(path))
            return call(path, *args, **kwargs)

        return guard

    with monkeypatch.context() as patch:
        for call in calls:
            patch.setattr(os, call, guarded(getattr(os, call)))
        if "stat" in calls:  # in Python 3.10 paths keep the os.stat of the time of their import
            patch.setattr(Path, "stat", guarded(Path.stat))
        with pytest.raises(Gpt2CupyError, match="Permission denied") as caught:
            checkpoint.open(tmp_path)
    assert str(tmp_path) in caught.value.where and caught.value.remedy
    assert checkpoint.open(tmp_path).config == TINY


@pytest.mark.parametrize("kind", ["pipe", "folder", "device"])
@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.safetensors.index.json", SHARD]
)
def test_no_plain_file(tmp_path, name, kind):
    """A pipe that nobody writes to must not be waited for, nor a device read for ever."""
    write_checkpoint(tmp_path, TINY, shards=1 if name == "model.safetensors" else 2)
    path = tmp_path / name
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    assert str(path) in refused(tmp_path, Gpt2CupyError).where


def test_a_pipe_in_place_of_a_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a plain file" in refused(tmp_path / "pipe").what


@pytest.mark.parametrize("name, said", [(None, "None"), (5, "an int"), (["gpt2"], "a list")])
def test_what_is_no_name(name, said):
    with pytest.raises(InputError, match=f"a checkpoint cannot be {said}"):
        checkpoint.open(name)


# -- shards --------------------------------------------------------------------------------------


def change_index(folder: Path, change) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_a_missing_shard(tmp_path):
    write_checkpoint(tmp_path, TINY, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "00002-of-00003" in refused(tmp_path).where


def test_a_shard_without_a_tensor_that_the_index_promises(tmp_path):
    write_checkpoint(tmp_path, TINY, shards=2)
    first = "model-00001-of-00002.safetensors"
    change_index(tmp_path, lambda places: places.update({"transformer.ln_f.bias": first}))
    change_index(tmp_path, lambda places: places.update({"transformer.ln_f.weight": first}))
    assert "is not in the shard" in refused(tmp_path).what


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "", "..", ".", 3, None])
def test_an_index_that_leads_elsewhere(tmp_path, name):
    folder = tmp_path / "folder"
    write_checkpoint(folder, TINY, shards=2)
    write_checkpoint(tmp_path, TINY)
    change_index(folder, lambda places: places.update({"transformer.wte.weight": name}))
    error = refused(folder)
    assert "index of shards" in error.what or "directory" in error.what


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": []}', "[" * 9999]
)
def test_a_broken_index(tmp_path, text):
    write_checkpoint(tmp_path, TINY, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path)
