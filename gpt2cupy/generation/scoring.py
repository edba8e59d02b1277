"""Log-probabilities of given tokens, by a window that slides over them."""

from __future__ import annotations

import weakref
from typing import Any

import numpy as np

from .. import ops
from ..config import GPT2Config
from ..errors import InputError, NonFiniteError, shown
from ..ids import check_ids
from ..model import GPT2
from ..ops.core.tape import recorded

_scored: weakref.WeakSet[GPT2] = weakref.WeakSet()  # models that have scored a text


def check_window(window: int | None, stride: int | None, config: GPT2Config) -> tuple[int, int]:
    """Window and stride with their defaults, checked: 1 <= stride <= window <= n_positions."""
    window = config.n_positions if window is None else window
    given = [window] if stride is None else [window, stride]
    integers = all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in given)
    if integers:
        stride = max(window // 2, 1) if stride is None else stride
        if 1 <= stride <= window <= config.n_positions:
            return int(window), int(stride)
    text = " with ".join(
        f"{name}={shown(value)}" for name, value in zip(("window", "stride"), given, strict=False)
    )
    raise InputError(
        f"{text} is impossible",
        where="score",
        remedy=f"They are integers, 1 <= stride <= window <= {config.n_positions}.",
    )


def token_logprobs(model: GPT2, tokens: np.ndarray, window: int, stride: int) -> np.ndarray:
    """Log-probability of every token after the first, float32 [N - 1].

    Parameters
    ----------
    model : GPT2
    tokens : numpy.ndarray of int32 [N]
    window, stride : int
        Tokens of a window, and how far each moves. A window scores only tokens
        that the one before did not.

    Raises
    ------
    NonFiniteError
        If logits are not finite.
    """
    if model.xp is not np and model not in _scored:
        _scored.add(model)
        with recorded():  # nothing runs, but its kernels are compiled side by side
            _window(model, tokens[: window + 1])
    parts, scored = [], 1  # tokens before `scored` have their log-probability
    for start in range(0, len(tokens), stride):
        # Inputs start .. end - 1 predict the tokens start + 1 .. end.
        end = min(start + window, len(tokens) - 1)
        logprobs = _window(model, tokens[start : end + 1])
        parts.append(logprobs[scored - start - 1 :])
        scored = end + 1
        if scored >= len(tokens):
            break
    logprobs = np.concatenate(parts)
    # Where it begins cannot be told: attention sums masked values too, times 0.
    if np.isnan(logprobs).any():
        raise non_finite(model, "score")
    return logprobs


def non_finite(model: GPT2, where: str, **results: Any) -> NonFiniteError:
    """The error for logits that are not finite, with the remedy for this model's dtype."""
    if model.dtype == np.float16:
        remedy = 'float16 ends at 65504: load the model with dtype="bfloat16" or "float32".'
    else:
        remedy = "The weights overflow: take another checkpoint, or repair this one."
    what = "the model's logits are not finite"
    return NonFiniteError(what, where=where, remedy=remedy, **results)


def _window(model: GPT2, tokens: np.ndarray) -> np.ndarray:
    """Log-probabilities of tokens[1:] given what stands before each."""
    config = model.config
    # NumPy would warn of an overflow; a log-probability of NaN is what comes of it.
    with np.errstate(over="ignore", invalid="ignore"):
        x = model.hidden(check_ids(tokens[:-1], config))[0]
        logits = model.xp.empty((len(x), config.padded_vocab_size), x.dtype)
        model.logits(x, model.new_workspace(len(x)), logits)
        targets = model.xp.asarray(tokens[1:])
        logprobs = ops.target_logprobs(logits, config.vocab_size, targets)
    return logprobs if model.xp is np else logprobs.get()
