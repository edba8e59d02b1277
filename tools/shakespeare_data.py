"""Text to batches of token ids for train_shakespeare.py: split, byte-level BPE, BPE-dropout."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

END_OF_TEXT = "<|endoftext|>"


def split_corpus(data: bytes, train_to: int, dev_to: int) -> tuple[str, str]:
    """Return the train and the dev text, which end at these percents of the bytes."""
    train_end, dev_end = len(data) * train_to // 100, len(data) * dev_to // 100
    return data[:train_end].decode(), data[train_end:dev_end].decode()


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    """Train a GPT-2 style byte-level BPE whose last id is ``<|endoftext|>``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    assert tokenizer.token_to_id(END_OF_TEXT) == vocab_size - 1, "text too short for the vocabulary"
    assert len(merges_of(tokenizer)) == vocab_size - 257, "two merges gave one token"
    return tokenizer


def merges_of(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """Return the merges, most frequent first."""
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


class Corpus:
    """The training text as words, each with several ways of being split into tokens.

    Parameters
    ----------
    text : str
    tokenizer : Tokenizer
    dropout : float
        Probability that BPE skips a merge it could make. With 0 there is one split per word.
    rng : numpy.random.Generator
    variants : int
        Random splits drawn for each distinct word, beside the regular one, which is number 0.
    """

    def __init__(
        self,
        text: str,
        tokenizer: Tokenizer,
        dropout: float,
        rng: np.random.Generator,
        variants: int = 16,
    ) -> None:
        pieces = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        kinds, words = np.unique(np.array(pieces, dtype=object), return_inverse=True)
        self.words, self.rng = words, rng
        newline = np.array([piece == "Ċ" for piece in pieces])
        # A speech starts at the top and after every blank line.
        self.speech = np.concatenate(([True, False], newline[:-2] & newline[1:-1] & ~newline[2:]))
        self.capacity = len(text.encode())  # tokens, were no merge ever made
        ranks = {pair: rank for rank, pair in enumerate(merges_of(tokenizer))}
        self.variants = variants + 1 if dropout > 0 else 1
        splits = [
            [tokenizer.token_to_id(token) for token in self._split(kind, ranks, p)]
            for kind in kinds
            for p in [0.0] + [dropout] * (self.variants - 1)
        ]
        self.sizes = np.array([len(split) for split in splits])
        self.offsets = np.cumsum(self.sizes) - self.sizes
        self.flat = np.concatenate([np.array(split) for split in splits])

    def _split(self, word: str, ranks: dict[tuple[str, str], int], dropout: float) -> list[str]:
        parts = list(word)
        while len(parts) > 1:
            pairs = [(ranks.get(pair, math.inf), i) for i, pair in enumerate(pairwise(parts))]
            if dropout:
                keep = self.rng.random(len(pairs)) >= dropout
                pairs = [pair for pair, kept in zip(pairs, keep, strict=True) if kept]
            rank, i = min(pairs, default=(math.inf, 0))
            if rank == math.inf:
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts

    def epoch(self, share: float) -> tuple[Tensor, Tensor]:
        """Split the text again, a ``share`` of its words at random.

        Returns
        -------
        ids, starts : Tensor
            The token ids of the whole text [T] and the positions where a speech starts.
        """
        chosen = self.rng.integers(self.variants, size=len(self.words))
        chosen *= self.rng.random(len(self.words)) < share
        row = self.words * self.variants + chosen
        sizes = self.sizes[row]
        begin = np.cumsum(sizes) - sizes
        index = np.repeat(self.offsets[row] - begin, sizes) + np.arange(sizes.sum())
        return torch.from_numpy(self.flat[index]), torch.from_numpy(begin[self.speech])


def draw_batch(
    ids: Tensor, size: Tensor, starts: Tensor, batch: int, window: int, end_of_text: int
) -> Tensor:
    """Draw windows [batch, window + 1] of the first ``size`` ids, a tensor so that it may change.

    One in eight is end-of-text and the start of a speech.
    """
    device, last = ids.device, size - window
    first = (torch.rand(batch, dtype=torch.float64, device=device) * last).long()
    speech = starts[torch.randint(len(starts), (batch,), device=device)]
    opens = (torch.rand(batch, device=device) < 0.125) & (speech < last)
    first = torch.where(opens, speech - 1, first)
    rows = ids[(first[:, None] + torch.arange(window + 1, device=device)).clamp_(min=0)]
    rows[:, 0] = torch.where(opens, end_of_text, rows[:, 0])
    return rows
