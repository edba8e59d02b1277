"""A language model so small that a step of it costs nothing."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
from builders import TINY, small_bpe, write_bpe, write_checkpoint

import gpt2cupy
from gpt2cupy.tokenizer import Tokenizer

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def write_small(folder: Path, n_positions: int = 160) -> Path:
    """A checkpoint of random weights with a tokenizer of bytes and a few merges."""
    vocab, merges = small_bpe()
    end = len(vocab) - 1
    config = dataclasses.replace(
        TINY, vocab_size=len(vocab), n_positions=n_positions, bos_token_id=end, eos_token_id=end
    )
    write_checkpoint(folder, config)
    write_bpe(folder, vocab, merges)
    return folder


def small_lm(folder: Path, device: str = "cpu") -> gpt2cupy.LanguageModel:
    """That checkpoint, loaded."""
    return gpt2cupy.load(str(write_small(folder)), device=device)


@functools.cache
def shakespeare_tokenizer() -> Tokenizer:
    """The tokenizer of the embedded model, read once."""
    with gpt2cupy.load(device="cpu") as lm:
        return lm.tokenizer
