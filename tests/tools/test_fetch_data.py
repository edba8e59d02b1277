"""tools/fetch_data.py, from files in the place of its origins."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("GPT2CUPY_TEST_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("fetch_data", ROOT / "tools" / "fetch_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def item(tool, tmp_path):
    """An item whose origin is a file."""
    origin = tmp_path / "origin"
    origin.write_bytes(b"words")
    return tool.Item("words.txt", origin.as_uri(), 5, hashlib.sha256(b"words").hexdigest())


def test_a_file_is_fetched_once(tool, item, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    assert tool.fetch(item, folder) == "fetched 5 bytes"
    assert [path.name for path in folder.iterdir()] == ["words.txt"]
    (tmp_path / "origin").unlink()
    assert tool.fetch(item, folder) == "is there"


def test_a_damaged_file_is_fetched_again(tool, item, tmp_path):
    (tmp_path / "words.txt").write_bytes(b"wor")
    assert tool.fetch(item, tmp_path).startswith("fetched")
    assert (tmp_path / "words.txt").read_bytes() == b"words"


@pytest.mark.parametrize("data", [b"", b"wordz", b"words and more"])
def test_another_file_is_refused(tool, item, tmp_path, data):
    (tmp_path / "origin").write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        tool.fetch(item, tmp_path)
    assert not (tmp_path / "words.txt").exists()


@pytest.mark.parametrize("name", ["gpt2-merges.bpe", "tinyshakespeare.txt"])
def test_the_hashes_are_those_of_the_data(tool, name):
    item = next(item for item in tool.ITEMS if item.name == name)
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{name} is not there: tools/fetch_data.py, GPT2CUPY_TEST_DATA")
    data = path.read_bytes()
    assert tool.is_right(item, data) and len(data) == item.size
