"""What goes into an engine and what comes out of it: requests and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..errors import InputError
from ..ids import check_tokens
from ..sampling import SamplingParams


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    Attributes
    ----------
    key : hashable
        Whatever the caller recognises it by.
    prompt : numpy.ndarray of int32 [T]
        At least one token.
    params : SamplingParams
    index : int
        Which of ``params.n`` continuations.
    eos : int or tuple of int
        Tokens that end it; -1 is none.
    priority : int
        Requests with a smaller one are admitted first.
    """

    key: Any
    prompt: np.ndarray
    params: SamplingParams
    index: int = 0
    eos: int | tuple[int, ...] = ()
    priority: int = 0

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens of ``eos``."""
        if isinstance(self.eos, int):
            return () if self.eos < 0 else (self.eos,)
        return self.eos

    @property
    def held_back(self) -> tuple[int, ...]:
        """Tokens that cannot be chosen before ``min_new_tokens``."""
        return (*self.ends, *self.params.stop_token_ids) if self.params.min_new_tokens else ()

    def check(self, config: GPT2Config) -> None:
        """Refuse what would fail in the middle of a step, beside the requests of others.

        Raises
        ------
        InputError
            If it has no token or asks for none, or an id is outside the vocabulary.
        """
        if not len(self.prompt) or self.params.max_new_tokens == 0:
            raise InputError(
                "the prompt has no token" if not len(self.prompt) else "no new token is asked for",
                where="Engine.submit",
                remedy="Give a prompt of at least one token, and ask for at least one.",
            )
        check_tokens(self.prompt, config)
        for name, ids in (("logit_bias", self.params.logit_bias), ("eos", self.held_back)):
            if ids and max(ids) >= config.vocab_size:
                raise InputError(
                    f"token id {max(ids)} is outside the vocabulary of {config.vocab_size}",
                    where=name,
                    remedy="Use ids of this model.",
                )

    def limit_in(self, capacity: int, slots: int) -> int:
        """Tokens that it may get in an engine of so many slots, each of so many tokens.

        Raises
        ------
        InputError
            If prompt and new tokens do not fit a slot, or if it speculates beside others.
        """
        length, wanted = len(self.prompt), self.params.must_fit
        room = capacity - length + 1
        if room < 1:
            raise InputError(
                f"a prompt of {length} tokens does not fit a slot of {capacity}",
                where="Engine.submit",
                remedy="Shorten the prompt, or make an Engine of a larger capacity.",
            )
        if wanted > room:
            raise InputError(
                f"{length} tokens of prompt and {wanted} new ones exceed a slot of {capacity}",
                where="Engine.submit",
                remedy=f"Ask for at most {room}, leave max_new_tokens out to fill the slot, or "
                "make an Engine of a larger capacity.",
            )
        if self.params.speculate and slots > 1:
            raise InputError(
                f"speculation is for one text at a time, and this engine has {slots} slots",
                where="Engine.submit: speculate",
                remedy="Take max_batch=1, or an Engine of one slot; several texts at once are "
                "faster without.",
            )
        return self.params.limit(room)


@dataclass(frozen=True)
class Token:
    """One token of a request as it leaves the engine.

    Attributes
    ----------
    key : hashable
        The request's.
    id : int
    logprob : float
        Under the raw logits.
    finish_reason : str or None
        "eos" (``id`` is an end token), "stop" (it is of ``stop_token_ids``), "length",
        "error" (the logits are not finite, and ``id`` means nothing), or None while it goes on.
    top : list of (int, float)
        The most probable tokens, where ``logprobs`` asks for them.
    drafted, accepted : int
        With the last token of a text that speculates: its drafts that steps verified, and those
        that were accepted.
    """

    key: Any
    id: int
    logprob: float
    finish_reason: str | None
    top: list[tuple[int, float]]
    drafted: int = 0
    accepted: int = 0
