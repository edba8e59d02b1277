"""Whether the settings of a request are possible, each alone and together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .errors import InputError, shown

if TYPE_CHECKING:
    from .sampling import SamplingParams

MAX_LOGPROBS = 20
MAX_CONTINUATIONS = 16384  # of a prompt: each is a request of its own, held until all are done
# Kernels take 32-bit values; a position is added to some of the integers.
LARGEST_INT = 2**30
LARGEST_FLOAT = float(np.finfo(np.float32).max)
SMALLEST_FLOAT = float(np.finfo(np.float32).smallest_normal)

# What None means for a field that has no use for it: that it is off.
OFF: dict[str, Any] = {
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


def check(params: SamplingParams) -> None:
    """Bring every field into its form, and refuse what is impossible."""
    for name, value in vars(params).copy().items():
        _set(params, name, OFF[name] if value is None and name in OFF else as_python(value))
    if params.max_new_tokens is not None:
        _check_int(params, "max_new_tokens", 0, allowed="0 or more, or None")
    _check_int(params, "min_new_tokens", 0, allowed="0 or more")
    _check_limits(params)
    _check_number(params, "temperature", 0, allowed="0 or more")
    _check_int(params, "top_k", 0, allowed="0 (off) or more")
    _check_number(params, "top_p", 0, 1, open_below=True, allowed="above 0 and at most 1 (off)")
    _check_number(params, "min_p", 0, 1, allowed="from 0 (off) to 1")
    # Kernels divide by it in float32.
    _check_number(params, "repetition_penalty", SMALLEST_FLOAT, allowed="above 0; 1 is off")
    for name in ("presence_penalty", "frequency_penalty"):
        _check_number(params, name, allowed="within float32")
    _check_bias(params)
    check_seed(params)
    _check_stops(params)
    _check_ends(params)
    _check_int(params, "n", 1, MAX_CONTINUATIONS, allowed=f"from 1 to {MAX_CONTINUATIONS}")
    if params.logprobs is not None:
        allowed = f"from 0 to {MAX_LOGPROBS}, or None"
        _check_int(params, "logprobs", 0, MAX_LOGPROBS, allowed=allowed)
    _check_speculation(params)
    _check_processor(params)


def check_seed(params: SamplingParams) -> None:
    """Refuse a seed that is no integer of 64 bits."""
    if params.seed is not None:
        _check_int(params, "seed", 0, 2**64 - 1, allowed="from 0 to 2**64 - 1, or None")


def _check_int(
    params: SamplingParams, name: str, least: int, most: int = LARGEST_INT, *, allowed: str
) -> None:
    value = getattr(params, name)
    if not _is_int(value, -math.inf, math.inf):
        _refuse(params, name, "an integer" + ", or None" * allowed.endswith("None"))
    if value > most == LARGEST_INT:
        _refuse(params, name, f"at most {most}")
    if not least <= value <= most:
        _refuse(params, name, allowed)


def _check_number(
    params: SamplingParams,
    name: str,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    open_below: bool = False,
    allowed: str,
) -> None:
    value = getattr(params, name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        _refuse(params, name, "a number")
    if value != value or value in (math.inf, -math.inf):
        _refuse(params, name, "finite")
    if not _is_number(value, least, most) or (open_below and value == least):
        _refuse(params, name, allowed)


def _check_limits(params: SamplingParams) -> None:
    limit = params.max_new_tokens
    if limit is not None and not isinstance(limit, UnsetLimit) and params.min_new_tokens > limit:
        raise InputError(
            f"min_new_tokens={params.min_new_tokens} is more than max_new_tokens={limit}",
            where="SamplingParams",
            remedy="Raise max_new_tokens or lower min_new_tokens.",
        )


def _check_bias(params: SamplingParams) -> None:
    bias = {} if params.logit_bias is None else params.logit_bias
    if not isinstance(bias, Mapping):
        _refuse(params, "logit_bias", "a mapping of token ids to numbers")
    bias = {as_python(id_): as_python(value) for id_, value in bias.items()}
    for id_, value in bias.items():
        if not _is_int(id_, 0):
            _refuse(params, "logit_bias", "a mapping of token ids, which are integers from 0")
        if value != -math.inf and not _is_number(value):
            _refuse(params, "logit_bias", "a mapping to finite numbers, or -inf to ban a token")
    _set(params, "logit_bias", bias)


def _check_stops(params: SamplingParams) -> None:
    stop = (params.stop,) if isinstance(params.stop, str) else params.stop
    if not isinstance(stop, list | tuple):
        _refuse(params, "stop", "a string or several")
    _set(params, "stop", tuple(map(as_python, stop)))
    if not all(isinstance(each, str) and each for each in params.stop):
        _refuse(params, "stop", "non-empty strings")
    if any(map(_has_surrogate, params.stop)):  # no text that a tokenizer gives has one
        _refuse(params, "stop", "strings without lone surrogates, which no text contains")


def _check_ends(params: SamplingParams) -> None:
    eos = params.eos_token_id
    if _is_iterable(eos):
        _set(params, "eos_token_id", tuple(map(as_python, eos)))  # type: ignore[arg-type]
        if not all(_is_int(id_, 0) for id_ in params.eos_token_id):  # type: ignore[union-attr]
            _refuse(params, "eos_token_id", "token ids from 0 on; -1 alone, not in a list, is none")
    elif eos is not None and not _is_int(eos, -1):
        _refuse(params, "eos_token_id", "a token id, several, -1, or None")
    if not _is_iterable(params.stop_token_ids):
        _refuse(params, "stop_token_ids", "several token ids")
    _set(params, "stop_token_ids", tuple(map(as_python, params.stop_token_ids)))
    if not all(_is_int(id_, 0) for id_ in params.stop_token_ids):
        _refuse(params, "stop_token_ids", "several token ids")


def _check_processor(params: SamplingParams) -> None:
    if params.logits_processor is not None and not callable(params.logits_processor):
        _refuse(params, "logits_processor", "a callable of ids and logits, or None")
    if params.logits_processor is not None and params.speculate:
        raise InputError(
            "speculation and a logits_processor exclude each other: it is called with the "
            "tokens before, and drafts are none yet",
            where="SamplingParams: speculate",
            remedy="Leave one of them out.",
        )


def _check_speculation(params: SamplingParams) -> None:
    speculate = params.speculate
    if speculate is not None and not (isinstance(speculate, str) and speculate == "ngram"):
        _refuse(params, "speculate", "'ngram' or None")
    if params.speculate and params.counts_tokens:
        raise InputError(
            "speculation and a penalty exclude each other: a penalty depends on all tokens "
            "before, drafts included",
            where="SamplingParams: speculate",
            remedy="Leave speculate out, or the penalty.",
        )


def _set(params: SamplingParams, name: str, value: Any) -> None:
    object.__setattr__(params, name, value)


def _refuse(params: SamplingParams, name: str, allowed: str) -> NoReturn:
    raise InputError(
        f"{name}={shown(getattr(params, name))} is impossible",
        where="SamplingParams",
        remedy=f"It must be {allowed}.",
    )


def as_python(value: Any) -> Any:
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
