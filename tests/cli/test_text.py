"""gpt2cupy score and gpt2cupy tokenize."""

from __future__ import annotations

import json
import re

import pytest
from command import CPU, call, done
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt2cupy
from gpt2cupy.checkpoint.resolve import EMBEDDED


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


def test_score(lm):
    text = "To be, or not to be: that is the question.\nWhether 'tis nobler — "
    found = lm.score(text)
    shown = done("score", text, *CPU)
    numbers = dict(re.findall(r"^(\w[\w ]*?) +([\d.]+)$", shown, re.MULTILINE))
    assert numbers == {
        "tokens": str(len(found.tokens)),
        "bytes": str(len(text.encode())),
        "bits per byte": f"{found.bits_per_byte(text):.4f}",
        "perplexity": f"{found.perplexity:.4f}",
    }
    assert done("score", *CPU, stdin=text.encode()) == shown


def test_score_per_token(lm):
    found = lm.score("To be")
    lines = done("score", "To be", *CPU, "--tokens").splitlines()
    each = [line.split("\t") for line in lines if "\t" in line]
    assert [int(line[0]) for line in each] == found.tokens
    assert [float(line[1]) for line in each] == pytest.approx(found.logprobs, abs=1e-4)
    assert [line[2] for line in each] == ["'To'", "' be'"]


def test_score_as_json_with_windows(lm, tmp_path):
    text = "To be, or not to be: that is the question. " * 5
    (tmp_path / "text").write_text(text)
    windows = ("--window", "16", "--stride", "4")
    row = json.loads(
        done("score", "--file", str(tmp_path / "text"), *CPU, *windows, "--json", "--tokens")
    )
    found = lm.score(text, window=16, stride=4)
    assert row["perplexity"] == found.perplexity != lm.score(text).perplexity
    assert row["bits_per_byte"] == found.bits_per_byte(text)
    assert (row["count"], row["tokens"]) == (len(found.tokens), found.tokens)
    assert row["logprobs"] == found.logprobs.tolist()
    short = json.loads(done("score", text, *CPU, "--json"))
    assert not {"tokens", "logprobs"} & short.keys()
    without = json.loads(done("score", text, *CPU, "--json", "--no-bos"))
    assert without["count"] == short["count"] - 1
    assert without["perplexity"] == lm.score(text, bos=False).perplexity


def test_a_batch_invariant_score():
    logprobs = {
        flags: json.loads(done("score", "To be", *CPU, "--json", "--tokens", *flags))["logprobs"]
        for flags in ((), ("--batch-invariant",))
    }
    with gpt2cupy.load(device="cpu", batch_invariant=True) as lm:
        assert logprobs["--batch-invariant",] == lm.score("To be").logprobs.tolist()
    assert logprobs["--batch-invariant",] != logprobs[()]


def test_nothing_to_score():
    code, out, err = call("score", "", *CPU, "--quiet")
    assert code == 1 and out == "" and "nothing to score" in err


def test_tokenize(lm):
    text = "To be, or naïve 🙂?"
    ids = lm.tokenizer.encode(text)
    assert done("tokenize", text) == " ".join(map(str, ids)) + "\n"
    row = json.loads(done("tokenize", text, "--json"))
    assert row == {"tokens": ids, "texts": [lm.tokenizer.decode([id_]) for id_ in ids]}


@settings(max_examples=25)
@given(st.text())
def test_decoding_gives_back_the_bytes(text):
    ids = done("tokenize", "-", stdin=text.encode())
    assert done("tokenize", "--decode", stdin=ids.encode()) == text


def test_ids_in_every_writing(lm):
    text = lm.tokenizer.decode([395, 304])
    for ids in (("395", "304"), ("395 304",), ("395,304",), ("[395, 304]",)):
        assert done("tokenize", "--decode", *ids) == text
    row = json.loads(done("tokenize", "--decode", "--json", "395", "304"))
    assert row == {"tokens": [395, 304], "text": text}
    assert done("tokenize", "--decode", stdin=b" \n") == ""


@pytest.mark.parametrize("ids", ["x", "1.5", "1 2 three", "99999", "9" * 5000])
def test_ids_that_are_none(ids):
    code, out, err = call("tokenize", "--decode", ids)
    assert code == 1 and out == "" and err.startswith("gpt2cupy: ") and err.count("\n") == 1


def test_special_tokens_only_when_asked(lm):
    text = "<|endoftext|>"
    assert done("tokenize", text, "--special") == f"{lm.tokenizer.eot_token}\n"
    assert len(done("tokenize", text).split()) > 1


def test_tokenize_needs_no_model():
    arguments = ("tokenize", "To be", "--tokenizer", str(EMBEDDED["shakespeare"]))
    assert done(*arguments, "--model", "/no/such/model") == done("tokenize", "To be")
