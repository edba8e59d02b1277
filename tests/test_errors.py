"""Every error says what, where and what to do; after any of them the process goes on.

The many ways in which a checkpoint or tokenizer can be broken are in
tests/checkpoint and test_tokenizer.py; prompts and settings in test_lm.py and
test_sampling.py; devices in test_device.py, the compiler and its cache
in test_compiler.py.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pickle
import re

import numpy as np
import pytest
from builders import TINY, hf_tensors, small_bpe, write_bpe, write_checkpoint, write_tensors

import gpt2cupy
from gpt2cupy import errors
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.record import ROOT
from gpt2cupy.tokenizer import Tokenizer
from gpt2cupy.weights import Weights

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass)]


@pytest.fixture
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


# -- the errors themselves -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_keeps_its_parts(kind):
    error = kind("it is wrong", where="here", remedy="Do that.")
    assert str(error) == "it is wrong (here). Do that."
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is kind and vars(copy) == vars(error) and str(copy) == str(error)
    assert isinstance(error, Gpt2CupyError)
    assert str(kind("it is wrong")) == "it is wrong"


def test_every_error_names_where_and_remedy():
    names = {kind.__name__ for kind in KINDS}
    calls = [
        (path, node)
        for path in (ROOT / "gpt2cupy").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names
    ]
    assert len(calls) > 50
    for path, node in calls:
        given = {keyword.arg for keyword in node.keywords}
        assert {"where", "remedy"} <= given, f"{path}:{node.lineno}"


def test_the_page_lists_every_error():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)`", text, re.MULTILINE)) == {k.__name__ for k in KINDS}


# -- going on ------------------------------------------------------------------------------------


def broken_checkpoints(folder):
    """(checkpoint that cannot be loaded, what is said of it)."""
    config = dataclasses.replace(TINY, vocab_size=300)
    says = {
        "cut": "not a valid safetensors file",
        "nan": "NaN",
        "lost": "ln_f.bias is missing",
        "shape": r"shape \[31\]",
        "config": "cannot read the configuration",
        "merges": "merge 0 does not fit",
    }
    for name in says:
        write_checkpoint(folder / name, config)
        write_bpe(folder / name, *small_bpe())
    whole = (folder / "cut" / "model.safetensors").read_bytes()
    (folder / "cut" / "model.safetensors").write_bytes(whole[:-100])
    tensors, key = hf_tensors(config, Weights.random(config, 0)), "transformer.ln_f.bias"
    write_tensors(folder / "nan", tensors | {key: np.full(32, np.nan, np.float32)})
    write_tensors(folder / "shape", tensors | {key: np.zeros(31, np.float32)})
    write_tensors(folder / "lost", {k: v for k, v in tensors.items() if k != key})
    (folder / "config" / "config.json").write_text('{"n_embd": ')
    (folder / "merges" / "merges.txt").write_text("no merge at all\n")
    return [(folder / name, text) for name, text in says.items()]


def test_the_process_goes_on_after_every_error(machine, lm, tmp_path):
    expected = lm.generate("ROMEO:", max_new_tokens=8, temperature=0.8, seed=1)
    score = lm.score("To be, or not to be").logprobs.tolist()
    calls = {
        "600 tokens": lambda: lm.generate([5] * 600),
        "1000000 new ones": lambda: lm.generate("a", max_new_tokens=10**6),
        "id 1000000": lambda: lm.generate([10**6]),
        "temperature=-1": lambda: lm.generate("a", temperature=-1),
        "nothing to score": lambda: lm.score(""),
        "id -1": lambda: lm([[-1]]),
        "'gpt-2'": lambda: gpt2cupy.load("gpt-2", device="cpu"),
        "no folder or file": lambda: gpt2cupy.load(tmp_path / "nowhere", device="cpu"),
        "no cuda:7": lambda: gpt2cupy.load(device="cuda:7"),
        "too little free memory": lambda: gpt2cupy.load(device="cuda"),
        "no tokenizer": lambda: Tokenizer.from_path(tmp_path),
    }
    for path, says in broken_checkpoints(tmp_path):
        calls[says] = lambda path=path: gpt2cupy.load(path, device="cpu")
    machine()
    kinds = set()
    for says, call in calls.items():
        with pytest.raises(Gpt2CupyError, match=says) as caught:
            call()
        assert caught.value.what and caught.value.where and caught.value.remedy
        kinds.add(type(caught.value).__name__)
        assert lm.generate("ROMEO:", max_new_tokens=8, temperature=0.8, seed=1) == expected
    assert kinds == {
        *("InputError", "CheckpointError", "ConfigError", "TokenizerError", "NoTokenizerError"),
        "DeviceMemoryError",
    }
    assert lm.score("To be, or not to be").logprobs.tolist() == score
    with gpt2cupy.load("shakespeare", device="cpu") as other:
        assert other.generate("ROMEO:", max_new_tokens=8, temperature=0.8, seed=1) == expected


@pytest.mark.gpu
def test_broken_checkpoints_are_found_on_the_way_to_a_gpu(tmp_path):
    for path, says in broken_checkpoints(tmp_path):
        with pytest.raises(Gpt2CupyError, match=says):
            gpt2cupy.load(path, device="cuda")
