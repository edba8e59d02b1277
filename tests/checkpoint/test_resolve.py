"""Names: which place each leads to, and what is said of those that lead nowhere."""

from __future__ import annotations

import importlib

import pytest
from builders import TINY, write_checkpoint

from gpt2cupy import checkpoint
from gpt2cupy.errors import CheckpointError


@pytest.fixture(autouse=True)
def asked(monkeypatch, tmp_path):
    """The hub ids asked for; nothing is downloaded."""
    found = []
    folder = tmp_path / "from-the-hub"
    write_checkpoint(folder, TINY)

    def download(repository, revision, wanted):
        found.append((repository, revision))
        return folder

    module = importlib.import_module("gpt2cupy.checkpoint.resolve")
    monkeypatch.setattr(module, "_download", download)
    return found


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("gpt2", "openai-community/gpt2"),
        ("gpt2-medium", "openai-community/gpt2-medium"),
        ("gpt2-large", "openai-community/gpt2-large"),
        ("gpt2-xl", "openai-community/gpt2-xl"),
        ("distilgpt2", "distilbert/distilgpt2"),
        ("owner/some.model_v-2", "owner/some.model_v-2"),
    ],
)
def test_aliases_and_hub_ids(name, repository, asked):
    found = checkpoint.open(name, revision="v1")
    assert asked == [(repository, "v1")]
    assert (found.name, found.config) == (name, TINY)


def test_a_folder_goes_before_an_alias(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "gpt2", TINY)
    assert checkpoint.open("gpt2").config == TINY
    assert not asked


def test_the_embedded_model_goes_before_everything(tmp_path, monkeypatch, asked):
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "shakespeare", TINY)
    assert checkpoint.open("shakespeare").config.vocab_size == 2048
    assert not asked


def test_home_and_path_objects(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_checkpoint(tmp_path / "model", TINY)
    assert checkpoint.open("~/model").config == TINY
    assert checkpoint.open(tmp_path / "model").name == str(tmp_path / "model")


@pytest.mark.parametrize(
    "name",
    ["", "gpt3", "gpt2-small", "a/b/c", "./a", "../a/b", "/no/where", "a/", "a b/c", "a/b\n"],
)
def test_unknown_names(name, asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.open(name)
    assert "distilgpt2" in caught.value.remedy
    assert not asked


@pytest.mark.parametrize("name", ["x" * 5000, "~no-such-user-here/model", "a\0b"])
def test_names_that_no_file_can_have(name, asked):
    with pytest.raises(CheckpointError):
        checkpoint.open(name)
    assert not asked


@pytest.mark.parametrize("local", [True, False])
def test_revisions_are_for_the_hub(tmp_path, local):
    write_checkpoint(tmp_path, TINY)
    with pytest.raises(CheckpointError, match="revision"):
        checkpoint.open(str(tmp_path) if local else "shakespeare", revision="main")
