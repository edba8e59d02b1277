"""From what a user passes to generate() and score() to checked token ids and settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..errors import InputError
from ..ids import check_tokens
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from .request import Request


def is_one(prompt: Any) -> bool:
    """Whether this is one prompt, text or token ids, rather than a list of prompts."""
    if isinstance(prompt, str):
        return True
    if not _is_sequence(prompt):
        raise _wrong_kind(prompt)
    if isinstance(prompt, np.ndarray):
        return prompt.ndim < 2
    # No prompts at all is an empty list of them; an empty one is written "".
    return len(prompt) > 0 and not (isinstance(prompt[0], str) or _is_sequence(prompt[0]))


def to_ids(prompt: Any, tokenizer: Tokenizer) -> list[int]:
    """Token ids of a text, or those given; their values are not yet checked."""
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not _is_sequence(prompt):
        raise _wrong_kind(prompt)
    return list(prompt)


def encode(prompt: Any, tokenizer: Tokenizer, config: GPT2Config) -> np.ndarray:
    """Ids [T] of a prompt, checked; an empty one becomes the end-of-text token."""
    ids = to_ids(prompt, tokenizer) or [tokenizer.eot_token]
    if len(ids) > config.n_positions:
        raise InputError(
            f"the prompt has {len(ids)} tokens, the context {config.n_positions}",
            where="prompt",
            remedy="Shorten the prompt.",
        )
    return check_tokens(ids, config)


def with_options(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    """``params``, or the defaults, with single fields replaced."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InputError(
            f"params cannot be a {type(params).__name__}",
            where="params",
            remedy="Pass SamplingParams(...), or its fields as keyword arguments.",
        )
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := set(options) - names:
        raise InputError(
            f"unknown sampling option {sorted(unknown)[0]!r}",
            where="SamplingParams",
            remedy=f"Options: {', '.join(sorted(names))}.",
        )
    return dataclasses.replace(params or SamplingParams(), **options)


def make_requests(
    prompts: Sequence[Any], params: SamplingParams, tokenizer: Tokenizer, config: GPT2Config
) -> list[Request]:
    """``params.n`` requests for each prompt, with keys (number of the prompt, continuation).

    Raises
    ------
    InputError
        If prompt and new tokens do not fit the context, or an id is unknown.
    """
    eos = params.eos_token_id
    if eos is None:
        eos = -1 if config.eos_token_id is None else config.eos_token_id
    for name, largest in (("eos_token_id", eos), ("logit_bias", max(params.logit_bias, default=0))):
        if largest >= config.vocab_size:
            raise InputError(
                f"token id {largest} is outside the vocabulary of {config.vocab_size}",
                where=name,
                remedy="Use ids of this model.",
            )
    requests = []
    for number, prompt in enumerate(prompts):
        ids = encode(prompt, tokenizer, config)
        # Without a most, what must come has to fit.
        name = "min_new_tokens" if params.max_new_tokens is None else "max_new_tokens"
        wanted = getattr(params, name)
        if len(ids) + wanted > config.n_positions + 1:
            raise InputError(
                f"{len(ids)} tokens of prompt and {wanted} new ones exceed the context of "
                f"{config.n_positions}",
                where=f"prompt {number}",
                remedy=f"Shorten the prompt or lower {name}.",
            )
        requests += [Request((number, i), ids, params, index=i, eos=eos) for i in range(params.n)]
    return requests


def _is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    # Bytes are sequences of integers, but nobody means them as token ids.
    other = str | bytes | bytearray | memoryview
    return isinstance(value, Sequence) and not isinstance(value, other)


def _wrong_kind(prompt: Any) -> InputError:
    return InputError(
        f"a prompt cannot be a {type(prompt).__name__}",
        where="prompt",
        remedy="Pass text, token ids, or a list of either; decode bytes first.",
    )
