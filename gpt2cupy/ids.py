"""Token ids as they come in: checked against the vocabulary and the context."""

from __future__ import annotations

from typing import Any

import numpy as np

from .config import GPT2Config
from .errors import InputError, kind_of, shown


def check_ids(ids: Any, config: GPT2Config) -> np.ndarray:
    """Token ids as a host array of int32 [B, T], checked against vocabulary and context."""
    host = _as_array(ids)
    if host.dtype.kind in "US":
        raise InputError(
            f"token ids cannot be text, as {shown(ids)} is",
            where="ids",
            remedy="Encode it first, as in lm(lm.encode(text)); generate() and score() take text.",
        )
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
    if host.shape == (0,):
        return np.zeros(0, np.int32)
    if host.ndim != 1 or host.dtype.kind not in "iu":
        what = f"{host.dtype}{list(host.shape)}"
        if host.ndim == 1 and host.dtype.kind not in "iu":
            whole = int, np.integer
            odd = [id_ for id_ in ids if isinstance(id_, bool) or not isinstance(id_, whole)]
            what = ", ".join(dict.fromkeys((shown(odd[0]), kind_of(odd[0])))) if odd else what
        raise InputError(
            f"token ids must be integers, not {what}",
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


def as_host(value: Any) -> Any:
    """A tensor of PyTorch or an array of CuPy as NumPy's; anything else as it is."""
    try:
        if all(hasattr(value, name) for name in ("detach", "cpu", "numpy")):
            return value.detach().cpu().numpy()
        if hasattr(value, "get") and hasattr(value, "dtype"):
            return value.get()
    except Exception as error:  # whatever the library raises
        raise _no_ids(value, error) from error
    return value


def _no_ids(value: Any, error: Exception) -> InputError:
    return InputError(
        f"token ids cannot be {kind_of(value)}: {error}"[:300],
        where="ids",
        remedy="Pass lists of integers, an array of NumPy or CuPy, or a tensor of PyTorch.",
    )


def _as_array(ids: Any) -> np.ndarray:
    try:
        return np.asarray(as_host(ids))
    except (TypeError, OverflowError) as error:
        raise _no_ids(ids, error) from error
    except ValueError as error:
        raise InputError(
            "token ids must be rows of one length",
            where="ids",
            remedy="Call with one row at a time; generate() takes prompts of any lengths.",
        ) from error
