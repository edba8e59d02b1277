"""Text for benchmarks that begin with it: a tokenizer of short words, texts of given length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from shared import BYTE_SYMBOLS, END_OF_TEXT

from gpt2cupy.tokenizer import Tokenizer

LETTERS = list("abcdefghijklmnopqrstuvwxyz        ")


def write_words(folder: Path, size: int) -> None:
    """A tokenizer of that size whose tokens are one to three characters, as text has them."""
    symbols = sorted(BYTE_SYMBOLS, key=BYTE_SYMBOLS.__getitem__)
    plain = [*(symbol for symbol in symbols if symbol.isascii()), "Ġ"]
    pairs = [(a, b) for a in plain for b in plain]
    threes = [(a + b, c) for c in plain for a, b in pairs]
    merges = (pairs + threes)[: size - 257]
    tokens = [*symbols, *(a + b for a, b in merges), END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(f"{a} {b}" for a, b in merges))


def texts(tokenizer: Tokenizer, count: int, tokens: int) -> list[str]:
    """Texts of words, each of so many tokens; the same in every run."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(count):
        ids = tokenizer.encode("".join(rng.choice(LETTERS, 4 * tokens)))[:tokens]
        found.append(tokenizer.decode(ids))
    return found
