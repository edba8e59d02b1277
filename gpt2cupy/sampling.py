"""SamplingParams: how a continuation is sampled and when it ends."""

from __future__ import annotations

import functools
import math
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from .errors import InputError, shown
from .ops.reference_sampling import ROW_PARAMS

MAX_LOGPROBS = 20
MAX_CONTINUATIONS = 16384  # of a prompt: each is a request of its own, held until all are done
# Kernels take 32-bit values; a position is added to some of the integers.
LARGEST_INT = 2**30
LARGEST_FLOAT = float(np.finfo(np.float32).max)
SMALLEST_FLOAT = float(np.finfo(np.float32).smallest_normal)


# What None means for a field that has no use for it: that it is off.
_OFF: dict[str, Any] = {
    "min_new_tokens": 0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "stop": (),
    "stop_token_ids": (),
}


class UnsetLimit(int):
    """A limit that nobody asked for: fewer tokens where the context ends, never an error."""


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
        for name, value in vars(self).copy().items():
            self._set(name, _OFF[name] if value is None and name in _OFF else _plain(value))
        if self.max_new_tokens is not None:
            self._check_int("max_new_tokens", 0, allowed="0 or more, or None")
        self._check_int("min_new_tokens", 0, allowed="0 or more")
        self._check_limits()
        self._check_number("temperature", 0, allowed="0 or more")
        self._check_int("top_k", 0, allowed="0 (off) or more")
        self._check_number("top_p", 0, 1, open_below=True, allowed="above 0 and at most 1 (off)")
        self._check_number("min_p", 0, 1, allowed="from 0 (off) to 1")
        # Kernels divide by it in float32.
        self._check_number("repetition_penalty", SMALLEST_FLOAT, allowed="above 0; 1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check_number(name, allowed="within float32")
        self._check_bias()
        self._check_seed()
        self._check_stops()
        self._check_ends()
        self._check_int("n", 1, MAX_CONTINUATIONS, allowed=f"from 1 to {MAX_CONTINUATIONS}")
        if self.logprobs is not None:
            allowed = f"from 0 to {MAX_LOGPROBS}, or None"
            self._check_int("logprobs", 0, MAX_LOGPROBS, allowed=allowed)
        self._check_speculation()
        self._check_processor()

    @classmethod
    def unchecked(cls, fields: Mapping[str, Any]) -> SamplingParams:
        """Those of fields as an instance has them, where they were checked before."""
        made = object.__new__(cls)
        vars(made).update(_default_fields(), **fields)
        return made

    def with_seed(self, seed: int) -> SamplingParams:
        """The same with another seed; nothing else is checked again, which takes much longer."""
        made = self.unchecked(vars(self) | {"seed": _plain(seed)})
        made._check_seed()
        return made

    def _check_seed(self) -> None:
        if self.seed is not None:
            self._check_int("seed", 0, 2**64 - 1, allowed="from 0 to 2**64 - 1, or None")

    def _check_int(self, name: str, least: int, most: int = LARGEST_INT, *, allowed: str) -> None:
        value = getattr(self, name)
        if not _is_int(value, -math.inf, math.inf):
            self._refuse(name, "an integer" + ", or None" * allowed.endswith("None"))
        if value > most == LARGEST_INT:
            self._refuse(name, f"at most {most}")
        if not least <= value <= most:
            self._refuse(name, allowed)

    def _check_number(
        self,
        name: str,
        least: float = -math.inf,
        most: float = math.inf,
        *,
        open_below: bool = False,
        allowed: str,
    ) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | float) or isinstance(value, bool):
            self._refuse(name, "a number")
        if value != value or value in (math.inf, -math.inf):
            self._refuse(name, "finite")
        if not _is_number(value, least, most) or (open_below and value == least):
            self._refuse(name, allowed)

    def _check_limits(self) -> None:
        limit = self.max_new_tokens
        if limit is not None and not self._limit_unset and self.min_new_tokens > limit:
            raise InputError(
                f"min_new_tokens={self.min_new_tokens} is more than max_new_tokens={limit}",
                where="SamplingParams",
                remedy="Raise max_new_tokens or lower min_new_tokens.",
            )

    def _check_bias(self) -> None:
        bias = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(bias, Mapping):
            self._refuse("logit_bias", "a mapping of token ids to numbers")
        bias = {_plain(id_): _plain(value) for id_, value in bias.items()}
        for id_, value in bias.items():
            if not _is_int(id_, 0):
                self._refuse("logit_bias", "a mapping of token ids, which are integers from 0")
            if value != -math.inf and not _is_number(value):
                self._refuse("logit_bias", "a mapping to finite numbers, or -inf to ban a token")
        self._set("logit_bias", bias)

    def _check_stops(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, list | tuple):
            self._refuse("stop", "a string or several")
        self._set("stop", tuple(map(_plain, stop)))
        if not all(isinstance(each, str) and each for each in self.stop):
            self._refuse("stop", "non-empty strings")
        if any(map(_has_surrogate, self.stop)):  # no text that a tokenizer gives has one
            self._refuse("stop", "strings without lone surrogates, which no text contains")

    def _check_ends(self) -> None:
        eos = self.eos_token_id
        if _is_iterable(eos):
            self._set("eos_token_id", tuple(map(_plain, eos)))  # type: ignore[arg-type]
            if not all(_is_int(id_, 0) for id_ in self.eos_token_id):  # type: ignore[union-attr]
                self._refuse(
                    "eos_token_id", "token ids from 0 on; -1 alone, not in a list, is none"
                )
        elif eos is not None and not _is_int(eos, -1):
            self._refuse("eos_token_id", "a token id, several, -1, or None")
        if not _is_iterable(self.stop_token_ids):
            self._refuse("stop_token_ids", "several token ids")
        self._set("stop_token_ids", tuple(map(_plain, self.stop_token_ids)))
        if not all(_is_int(id_, 0) for id_ in self.stop_token_ids):
            self._refuse("stop_token_ids", "several token ids")

    def _check_processor(self) -> None:
        if self.logits_processor is not None and not callable(self.logits_processor):
            self._refuse("logits_processor", "a callable of ids and logits, or None")
        if self.logits_processor is not None and self.speculate:
            raise InputError(
                "speculation and a logits_processor exclude each other: it is called with the "
                "tokens before, and drafts are none yet",
                where="SamplingParams: speculate",
                remedy="Leave one of them out.",
            )

    def _check_speculation(self) -> None:
        speculate = self.speculate
        if speculate is not None and not (isinstance(speculate, str) and speculate == "ngram"):
            self._refuse("speculate", "'ngram' or None")
        if self.speculate and self.counts_tokens:
            raise InputError(
                "speculation and a penalty exclude each other: a penalty depends on all tokens "
                "before, drafts included",
                where="SamplingParams: speculate",
                remedy="Leave speculate out, or the penalty.",
            )

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _refuse(self, name: str, allowed: str) -> NoReturn:
        raise InputError(
            f"{name}={shown(getattr(self, name))} is impossible",
            where="SamplingParams",
            remedy=f"It must be {allowed}.",
        )

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
        off = {**_OFF, "seed": None, "n": 1}
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


def _plain(value: Any) -> Any:
    """NumPy's scalar as Python's."""
    scalar = isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0)
    return value.item() if scalar else value


def _has_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping)


def _is_int(value: Any, least: float, most: float = LARGEST_INT) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def _is_number(value: Any, least: float = -math.inf, most: float = math.inf) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and max(least, -LARGEST_FLOAT) <= value <= min(most, LARGEST_FLOAT)
    )
