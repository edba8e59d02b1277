"""Token ids as they come in: checked against the vocabulary and the context."""

from __future__ import annotations

from typing import Any

import numpy as np

from .config import GPT2Config
from .errors import InputError


def check_ids(ids: Any, config: GPT2Config) -> np.ndarray:
    """Token ids as a host array of int32 [B, T], checked against vocabulary and context."""
    host = _as_array(ids)
    if host.ndim == 1:
        host = host[None]
    if host.ndim != 2 or host.size == 0:
        raise InputError(
            f"token ids must be [B, T], not {list(host.shape)}",
            where="ids",
            remedy="Pass at least one token per row, and rows of one length.",
        )
    tokens = check_tokens(host.reshape(-1), config).reshape(host.shape)
    if host.shape[1] > config.n_positions:
        raise InputError(
            f"{host.shape[1]} tokens exceed the context of {config.n_positions}",
            where="ids",
            remedy="Shorten the input or use score() with a sliding window.",
        )
    return tokens


def check_tokens(ids: Any, config: GPT2Config) -> np.ndarray:
    """Token ids as int32 [N], each checked to be an integer of the vocabulary."""
    host = _as_array(ids)
    if host.ndim != 1 or host.dtype.kind not in "iu":
        raise InputError(
            f"token ids must be integers, not {host.dtype}{list(host.shape)}",
            where="ids",
            remedy="Pass a flat list of integers.",
        )
    wrong = host[(host < 0) | (host >= config.vocab_size)]
    if wrong.size:
        raise InputError(
            f"token id {wrong[0]} is outside the vocabulary of {config.vocab_size}",
            where="ids",
            remedy="Encode the text with this model's own tokenizer.",
        )
    return host.astype(np.int32)


def _as_array(ids: Any) -> np.ndarray:
    if hasattr(ids, "get") and hasattr(ids, "dtype"):
        ids = ids.get()
    try:
        return np.asarray(ids)
    except TypeError as error:  # as of a torch tensor on a GPU
        raise InputError(
            f"token ids cannot be a {type(ids).__name__}: {error}",
            where="ids",
            remedy="Pass lists of integers, or a NumPy or CuPy array.",
        ) from error
    except ValueError as error:
        raise InputError(
            "token ids must be rows of one length",
            where="ids",
            remedy="Call with one row at a time; generate() takes prompts of any lengths.",
        ) from error
