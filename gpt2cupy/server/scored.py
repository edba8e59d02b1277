"""Log-probabilities of a prompt's own tokens, for ``echo`` with ``logprobs``."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np

from .. import ops
from ..generation.scoring import non_finite


def scored(
    engine: Any, tokens: np.ndarray, top: int
) -> tuple[np.ndarray, tuple[int, np.ndarray, np.ndarray]]:
    """Log-probabilities of all tokens but the first, each given those before it.

    Parameters
    ----------
    engine : Engine
    tokens : numpy.ndarray of int32 [N]
        At most the context.
    top : int
        Most probable tokens that are wanted at each place.

    Returns
    -------
    logprobs : numpy.ndarray of float32 [N - 1]
    top : (int, numpy.ndarray of int32, numpy.ndarray of float32)
        How many there are at each place, their ids and log-probabilities.

    Raises
    ------
    NonFiniteError
        If logits are not finite.
    """
    model = engine.model
    xp, config = model.xp, model.config
    if len(tokens) < 2:
        return np.zeros(0, np.float32), (top, np.zeros(0, np.int32), np.zeros(0, np.float32))
    quiet = np.errstate(over="ignore", invalid="ignore")
    with engine.device, engine.stream, quiet if xp is np else contextlib.nullcontext():
        x = model.hidden(tokens[None, :-1])[0]
        logits = xp.empty((len(x), config.padded_vocab_size), x.dtype)
        model.logits(x, model.new_workspace(len(x)), logits)
        logprobs = ops.target_logprobs(logits, config.vocab_size, xp.asarray(tokens[1:]))
        best = ops.top_logprobs(logits, config.vocab_size, top) if top else None
        if xp is not np:
            logprobs = logprobs.get()
            best = best and tuple(each.get() for each in best)
    if np.isnan(logprobs).any():
        raise non_finite(model, "score")
    if best is None:
        return logprobs, (0, np.zeros(0, np.int32), np.zeros(0, np.float32))
    return logprobs, (top, best[0].astype(np.int32), best[1].astype(np.float32))
