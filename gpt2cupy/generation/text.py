"""What generation and scoring give back, and how text grows from tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError, TokenizerError, shown
from ..tokenizer import Tokenizer


@dataclass(frozen=True)
class Piece:
    """What :meth:`LanguageModel.stream` yields for each token.

    Attributes
    ----------
    text : str
        New text; "" while a character is incomplete or may belong to a stop string.
    token : int
    logprob : float
        Of the token under the raw logits.
    finish_reason : str or None
        "eos", "stop", "length" with the last token, None before.
    prefill_seconds : float
        From the call to the first token.
    tokens_per_second : float
        Of the tokens after the first; 0 at the first.
    top : list of (int, float)
        Most probable tokens, where ``logprobs`` asks for them.
    drafted, accepted : int
        With ``speculate``, in the last piece: as in :class:`Completion`.
    """

    text: str
    token: int
    logprob: float
    finish_reason: str | None
    prefill_seconds: float
    tokens_per_second: float
    top: list[tuple[int, float]]
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)

    def __hash__(self) -> int:
        return hash((self.text, self.token, self.logprob, self.finish_reason))


@dataclass(frozen=True)
class Completion:
    """One finished continuation; equal to another if all that it holds is equal.

    Attributes
    ----------
    text : str
        Without the prompt; U+FFFD where ``tokens`` are no text, "" where the model has
        no tokenizer.
    tokens : list of int
    logprobs : list of float
        Of each token under the raw logits.
    finish_reason : str
        "eos", "stop" or "length".
    prompt_ids : list of int
    top : list of list of (int, float)
        Most probable tokens of each step, where ``logprobs`` asks for them.
    seed : int or None
        What its random numbers came from, given or drawn; None in greedy decoding.
    drafted, accepted : int
        With ``speculate``: draft tokens that were verified, and those that were accepted. Both are
        0 for a text that a stop string ended. Equality leaves them out.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt_ids: list[int]
    top: list[list[tuple[int, float]]]
    seed: int | None = None
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt_ids)

    def __hash__(self) -> int:
        return hash((self.text, *self.tokens, self.finish_reason, *self.prompt_ids, self.seed))


@dataclass(frozen=True, eq=False)
class Score:
    """Log-probabilities of given text; equal to another if tokens and values are equal.

    Attributes
    ----------
    tokens : list of int
        The tokens scored; the first of the input only if something stands before it.
    logprobs : numpy.ndarray of float32
        Natural logarithms, one per scored token.
    """

    tokens: list[int]
    logprobs: np.ndarray

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Score):
            return NotImplemented
        return self.tokens == other.tokens and np.array_equal(self.logprobs, other.logprobs)

    def __hash__(self) -> int:
        return hash((*self.tokens, self.logprobs.tobytes()))

    @property
    def total(self) -> float:
        """Log-probability of all the tokens together: their sum."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """e to the power of the mean negative log-probability; infinite beyond 709 nats."""
        nats = -float(self.logprobs.mean(dtype=np.float64))
        try:
            return math.exp(nats)
        except OverflowError:
            return math.inf

    def bits_per_byte(self, text: str) -> float:
        """Bits that the text costs per byte of its UTF-8.

        Raises
        ------
        InputError
            If the text is empty.
        """
        if not isinstance(text, str) or not text:
            raise InputError(
                f"{shown(text)} has no bytes",
                where="bits_per_byte",
                remedy="Pass the text that was scored.",
            )
        return -self.total / math.log(2) / len(text.encode("utf-8", "replace"))


@dataclass(frozen=True)
class PromptScore:
    """Log-probabilities of a prompt's own tokens, after its first.

    Attributes
    ----------
    logprobs : list of float [T - 1]
    top : list of list of (int, float) [T - 1]
        Most probable tokens of each place; empty lists where none are asked for.
    """

    logprobs: list[float]
    top: list[list[tuple[int, float]]]


class GrowingText:
    """Text of one continuation while it grows: streaming decoder and stop strings.

    An id that the model has and the tokenizer has not, as in vocabularies padded
    by whoever trained the model, becomes U+FFFD.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.decoder = tokenizer.stream()
        self.stops = stops
        # All that may stand at the end of a text before the rest of a stop string.
        self._openings = tuple(stop[:size] for stop in stops for size in range(1, len(stop)))
        self.held = ""  # text that may be the beginning of a stop string

    def push(self, id_: int, finish_reason: str | None) -> tuple[str, str | None]:
        """New text that is safe to show, and the finish reason if it has ended."""
        if finish_reason == "error":
            return "", "error"
        text = self.held
        if finish_reason not in ("eos", "stop"):
            text += self.decode(id_)
        if finish_reason:
            text += self.decoder.flush()
        ends = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if ends:
            return text[: min(ends)], "stop"
        keep = 0 if finish_reason else self._open_stop(text)
        self.held = text[len(text) - keep :]
        return text[: len(text) - keep], finish_reason

    def decode(self, id_: int) -> str:
        """What an id adds to the text."""
        try:
            return self.decoder.push(id_)
        except TokenizerError:
            return self.decoder.flush() + "\ufffd"

    def _open_stop(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        if not text.endswith(self._openings):
            return 0
        return max(len(each) for each in self._openings if text.endswith(each))


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of a whole continuation; ids that the tokenizer has not become U+FFFD."""
    try:
        return tokenizer.decode(ids)
    except TokenizerError:
        growing = GrowingText(tokenizer, ())
        return "".join(map(growing.decode, ids)) + growing.decoder.flush()
