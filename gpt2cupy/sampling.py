"""SamplingParams: how a continuation is sampled and when it ends."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .ops.reference_sampling import ROW_PARAMS
from .sampling_checks import MAX_CONTINUATIONS as MAX_CONTINUATIONS
from .sampling_checks import MAX_LOGPROBS as MAX_LOGPROBS
from .sampling_checks import OFF, SMALLEST_FLOAT, UnsetLimit, as_python, check, check_seed

DEFAULT_NEW_TOKENS = UnsetLimit(200)


@dataclass(frozen=True)
class SamplingParams:
    """Settings of one request; the defaults are greedy decoding.

    docs/sampling.md says in which order they work and what is promised. Scalars of
    NumPy are taken as Python's; None switches a filter, a penalty or a stop off.

    Parameters
    ----------
    max_new_tokens : int, optional
        Tokens to generate at most; None goes on to the end of the context. Left out, it
        is 200, at least ``min_new_tokens``, and at most what fits the context.
    min_new_tokens : int
        No token that ends the text can be chosen before that many; at most
        ``max_new_tokens``.
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
        Added to the logits of these token ids, before everything else; negative
        infinity bans a token.
    seed : int, optional
        64 bits; the same seed gives the same text. None draws one.
    stop : str or sequence of str
        The text ends before the first of these.
    eos_token_id : int or sequence of int, optional
        Tokens that end the text; None takes the model's, -1 none.
    stop_token_ids : sequence of int
        Further tokens that end the text; the reason is "stop".
    n : int
        Continuations of each prompt, at most 16,384; number i uses seed + i.
    logprobs : int, optional
        Also give that many most probable tokens with each token, at most 20.
    speculate : {None, "ngram"}
        "ngram" guesses tokens from what the text has said before and verifies up to three in
        one step: faster where a text repeats itself, and the same text. For one text at a time
        (``max_batch=1``), and not with a penalty.
    logits_processor : callable, optional
        Called before each token as ``logits_processor(ids, logits)``: the ids of prompt and text
        so far (int32 [T], on the host) and the logits of the next token (float32 [V], of CuPy
        on a GPU), which it changes in place or returns anew. Everything else is applied
        afterwards, and log-probabilities are of what it leaves. The text waits for Python at
        every token, and so do those that run beside it. Not with ``speculate``.

    Raises
    ------
    InputError
        If a value is impossible.
    """

    max_new_tokens: int | None = DEFAULT_NEW_TOKENS
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
    stop: str | Sequence[str] = ()
    eos_token_id: int | Sequence[int] | None = None
    stop_token_ids: Sequence[int] = ()
    n: int = 1
    logprobs: int | None = None
    speculate: str | None = None
    logits_processor: Callable[[np.ndarray, Any], Any] | None = None

    def __post_init__(self) -> None:
        check(self)

    @classmethod
    def unchecked(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Those of fields as an instance has them, where they were checked before."""
        made = object.__new__(cls)
        vars(made).update(_default_fields(), **fields)
        return made

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with another seed; nothing else is checked again, which takes much longer."""
        made = self.unchecked(vars(self) | {"seed": as_python(seed)})
        check_seed(made)
        return made

    @property
    def _limit_unset(self) -> bool:
        return isinstance(self.max_new_tokens, UnsetLimit)

    @property
    def must_fit(self) -> int:
        """New tokens for which the context must have room."""
        wanted = self.max_new_tokens
        return self.min_new_tokens if wanted is None or self._limit_unset else wanted

    def limit(self, room: int) -> int:
        """Tokens to generate at most where so many fit."""
        wanted = room if self.max_new_tokens is None else self.max_new_tokens
        if self._limit_unset:
            wanted = max(wanted, self.min_new_tokens)
        return min(wanted, room)

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        # Kernels multiply by the reciprocal, which must be a number.
        return self.temperature < SMALLEST_FLOAT

    @property
    def banned(self) -> frozenset[int]:
        """Tokens that ``logit_bias`` bans."""
        return frozenset(id_ for id_, value in self.logit_bias.items() if value == -math.inf)

    def without_effect(self) -> list[str]:
        """Settings that change nothing because no chance is involved, as ``name=value``."""
        if not self.greedy:
            return []
        names = ("top_k", "top_p", "min_p", "seed", "n")
        values = {name: getattr(self, name) for name in names}
        off = {**OFF, "seed": None, "n": 1}
        return [f"{name}={value}" for name, value in values.items() if value != off[name]]

    @property
    def counts_tokens(self) -> bool:
        """Whether a penalty needs to know what was generated."""
        penalties = (self.presence_penalty, self.frequency_penalty)
        return self.repetition_penalty != 1 or any(penalties)

    @property
    def plain(self) -> bool:
        """Whether nothing but the temperature shapes sampling."""
        filters = self.top_k or self.top_p < 1 or self.min_p
        shaped = self.counts_tokens or self.logit_bias or self.min_new_tokens
        return not shaped and (self.temperature == 0 or not filters)

    def row(self, index: int, prompt_length: int, eos: int) -> np.ndarray:
        """``ROW_PARAMS`` of continuation ``index`` of a prompt, one entry."""
        seed = secrets.randbits(64) if self.seed is None else (self.seed + index) % 2**64
        temperature = 0.0 if self.greedy else self.temperature
        values = (
            seed, temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
            self.presence_penalty, self.frequency_penalty, eos,
            prompt_length + self.min_new_tokens, 0,
        )  # fmt: skip
        return np.array([values], ROW_PARAMS)


@functools.lru_cache(1)
def _default_fields() -> dict[str, Any]:
    return dict(vars(SamplingParams()))
