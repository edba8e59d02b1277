"""Every command that loads a model takes the same files: variants, adapters, tokenizers."""

from __future__ import annotations

import json

import pytest
from adapter_writer import write_adapter
from builders import TINY, write_checkpoint
from command import CPU, call, done

from gpt2cupy.checkpoint.resolve import EMBEDDED

SMALL = ("--steps", "3", "--json")
PROFILED = ("--runs", "1", "--warmup", "0", "--tokens", "2", "--json")


@pytest.fixture(scope="module")
def variant(tmp_path_factory):
    """A folder that has its weights as a variant alone."""
    folder = tmp_path_factory.mktemp("variant")
    write_checkpoint(folder, TINY)
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    return str(folder)


@pytest.mark.parametrize("rest", [("info",), ("validate", *SMALL), ("profile", *PROFILED)])
def test_a_variant_is_taken_by_each_command(variant, rest):
    given = () if rest[0] != "profile" else ("--tokenizer", str(EMBEDDED["shakespeare"]))
    asked = (*rest, *CPU, "--model", variant)
    assert "pass --variant fp16" in call(*asked)[2]
    if rest[0] == "profile":  # the prompt is text, and the model has 211 tokens
        asked += given
        assert "different checkpoints" in call(*asked, "--variant", "fp16")[2]
        return
    assert done(*asked, "--variant", "fp16")


def test_an_adapter_changes_what_is_validated(tmp_path):
    write_checkpoint(tmp_path / "base", TINY)
    adapter = str(write_adapter(tmp_path / "adapter"))
    base = str(tmp_path / "base")
    found = [
        json.loads(done("validate", base, *CPU, *SMALL, *rest))
        for rest in ((), ("--adapter", adapter))
    ]
    assert all(each["passed"] for each in found)
    assert found[0]["comparisons"] != found[1]["comparisons"]
    assert done("info", *CPU, "--model", base, "--adapter", adapter)
    code, _, said = call("validate", base, *CPU, *SMALL, "--adapter", adapter, "--against", "hf")
    assert code == 2 and "without its adapter" in said and "--reference" in said


def test_an_adapter_and_a_tokenizer_are_profiled(tmp_path):
    options = ("--adapter", str(tmp_path), "--model", "shakespeare")
    code, _, said = call("profile", *CPU, *PROFILED, *options)
    assert code == 1 and "no adapter_config.json" in said


def test_steps_that_nobody_asked_for_are_what_fits_the_context(tmp_path):
    write_checkpoint(tmp_path, TINY)
    found = json.loads(done("validate", str(tmp_path), *CPU, "--batch", "1", "--json"))
    assert {len(each["steps"]) for each in found["comparisons"]} == {TINY.n_positions}
    code, _, said = call("validate", str(tmp_path), *CPU, "--steps", "49")
    assert code == 2 and "at most 48 steps" in said
