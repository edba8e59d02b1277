"""What goes into an engine and what comes out of it: requests and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """

    key: Any
    id: int
    logprob: float
    finish_reason: str | None
    top: list[tuple[int, float]]
