"""What a decode step computes, as functions of model and state; here by ops, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import ops
from ..model import GPT2
from .state import DecodeState

# One way to compute a step: queues its kernels, which feed every row its token and sample the next.
StepFunction = Callable[[GPT2, DecodeState], None]


def ops_step(model: GPT2, state: DecodeState) -> None:
    """Queue one step as the ops of :meth:`GPT2.decode`, and sampling."""
    if state.xp is np and (state.slots < 0).any():
        _run_used_rows(model, state)
        return
    model.decode(state.ids, state.positions, state.slots, state.cache, state.work, state.logits)
    sample_next(state, state.logits, state.rows)


def _run_used_rows(model: GPT2, state: DecodeState) -> None:
    """The step on NumPy, where idle rows cost as much as others and can be left out."""
    used = np.flatnonzero(state.slots >= 0).astype(np.int32)
    state.steps[state.slots < 0] += 1  # as on the GPU, where each row makes every step
    if not len(used):
        return
    # BLAS sums a GEMV in another order than one of several: a single row is
    # run twice, so that its bits do not depend on whether it has neighbours.
    rows = np.resize(used, max(len(used), 2))
    logits = model.decode(
        state.ids[rows],
        state.positions[rows],
        state.slots[rows],
        state.cache,
        state.work.first(len(rows)),
        state.scratch[: len(rows)],
    )
    state.logits[rows] = logits
    sample_next(state, logits[: len(used)], used)


def sample_next(state: DecodeState, logits: Any, rows: Any) -> None:
    """Queue the sampling of the next token of ``rows``, one per line of ``logits``."""
    ops.sample(
        logits,
        state.vocab_size,
        rows,
        state.params,
        state.ids,
        state.positions,
        state.steps,
        state.ring,
        counts=state.counts,
        bias=state.bias,
        scratch=state.scratch[: len(rows)],
        plain=state.plain,
    )
