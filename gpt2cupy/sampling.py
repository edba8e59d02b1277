"""SamplingParams: how a continuation is chosen and when it ends."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .errors import InputError
from .ops.reference_sampling import ROW_PARAMS

MAX_LOGPROBS = 20
# Kernels take 32-bit values; a position is added to some of the integers.
LARGEST_INT = 2**30
LARGEST_FLOAT = float(np.finfo(np.float32).max)
SMALLEST_FLOAT = float(np.finfo(np.float32).smallest_normal)


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request; the defaults are greedy decoding.

    docs/sampling.md says in which order they work and what is promised.

    Parameters
    ----------
    max_new_tokens : int, optional
        Tokens to generate at most; None goes on to the end of the context.
    min_new_tokens : int
        The end-of-text token cannot be chosen before that many; at most ``max_new_tokens``.
    temperature : float
        0 takes the most probable token, of equals the one with the smaller id;
        otherwise logits are divided by it and a token is drawn. Below 1.2e-38, the
        smallest normal float32, it counts as 0.
    top_k : int
        Draw from the k most probable tokens; 0 is off.
    top_p : float
        Draw from the smallest set of tokens whose probability reaches this; 1 is off.
    min_p : float
        Drop tokens less probable than this times the most probable one; 0 is off.
    repetition_penalty : float
        Divides positive and multiplies negative logits of tokens in the prompt
        or the text so far; 1 is off.
    presence_penalty : float
        Subtracted from the logit of each token generated so far, once.
    frequency_penalty : float
        The same, as many times as the token was generated.
    logit_bias : mapping of int to float
        Added to the logits of these token ids, before everything else.
    seed : int, optional
        64 bits; the same seed gives the same text. None draws one.
    stop : str or sequence of str
        The text ends before the first of these.
    eos_token_id : int, optional
        Token that ends the text; None takes the model's, -1 none.
    n : int
        Continuations of each prompt; number i uses seed + i.
    logprobs : int, optional
        Also give that many most probable tokens with each token, at most 20.

    Raises
    ------
    InputError
        If a value is impossible.
    """

    max_new_tokens: int | None = 64
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    eos_token_id: int | None = None
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).copy().items():
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
        self._require(isinstance(self.stop, str | list | tuple), "stop", "a string or several")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        limit = self.max_new_tokens
        self._require(limit is None or _is_int(limit, 0), "max_new_tokens", "0 or more, or None")
        self._require(_is_int(self.min_new_tokens, 0), "min_new_tokens", "an integer, 0 or more")
        if limit is not None and self.min_new_tokens > limit:
            default = ", its default" if limit == SamplingParams.max_new_tokens else ""
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} is more than "
                f"max_new_tokens={limit}{default}",
                where="SamplingParams",
                remedy="Raise max_new_tokens or lower min_new_tokens.",
            )
        self._require(_is_number(self.temperature, 0), "temperature", "0 or more")
        self._require(_is_int(self.top_k, 0), "top_k", "an integer, 0 (off) or more")
        in_unit = _is_number(self.top_p, 0, 1) and self.top_p > 0
        self._require(in_unit, "top_p", "above 0 and at most 1 (off)")
        self._require(_is_number(self.min_p, 0, 1), "min_p", "from 0 (off) to 1")
        positive = _is_number(self.repetition_penalty, 0) and self.repetition_penalty > 0
        self._require(positive, "repetition_penalty", "above 0; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            self._require(_is_number(getattr(self, name)), name, "a finite number")
        self._require(isinstance(self.logit_bias, Mapping), "logit_bias", "a mapping")
        fits = all(_is_int(k, 0) and _is_number(v) for k, v in self.logit_bias.items())
        self._require(fits, "logit_bias", "a mapping of token ids to finite numbers")
        seed_fits = self.seed is None or _is_int(self.seed, 0, 2**64 - 1)
        self._require(seed_fits, "seed", "from 0 to 2**64 - 1, or None")
        self._require(all(isinstance(s, str) and s for s in stop), "stop", "non-empty strings")
        eos = self.eos_token_id
        self._require(eos is None or _is_int(eos, -1), "eos_token_id", "a token id, -1, or None")
        self._require(_is_int(self.n, 1), "n", "an integer, 1 or more")
        count = self.logprobs
        self._require(
            count is None or (_is_int(count, 0) and count <= MAX_LOGPROBS),
            "logprobs",
            f"from 0 to {MAX_LOGPROBS}, or None",
        )

    def _require(self, condition: bool, name: str, allowed: str) -> None:
        if not condition:
            raise InputError(
                f"{name}={getattr(self, name)!r} is impossible",
                where="SamplingParams",
                remedy=f"It must be {allowed}.",
            )

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty needs to know what was generated."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        return self.repetition_penalty != 1 or any(penalties)

    @property
    def plain(self) -> bool:
        """Whether nothing but the temperature shapes the choice."""
        filters = self.top_k or self.top_p < 1 or self.min_p
        shaped = self.counts_tokens or self.logit_bias or self.min_new_tokens
        return not shaped and (self.temperature == 0 or not filters)

    def row(self, index: int, prompt_length: int, eos: int) -> np.ndarray:
        """``ROW_PARAMS`` of continuation ``index`` of a prompt, one entry."""
        seed = secrets.randbits(64) if self.seed is None else (self.seed + index) % 2**64
        # Kernels multiply by the reciprocal, which must be a number.
        temperature = self.temperature if self.temperature >= SMALLEST_FLOAT else 0.0
        values = (
            seed, temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            self.presence_penalty, self.frequency_penalty, eos,
            prompt_length + self.min_new_tokens, 0,
        )  # fmt: skip
        return np.array([values], ROW_PARAMS)


def _is_int(value: Any, least: int, most: int = LARGEST_INT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and max(least, -LARGEST_FLOAT) <= value <= min(most, LARGEST_FLOAT)
    )
