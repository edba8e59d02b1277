"""Steps that verify drafts: several rows of one text, of which the device keeps what stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..cache import KVCache
from ..model import GPT2
from ..ops.sampling import RING_ENTRY
from . import persistent
from .state import DecodeState

DRAFTS = 3  # of a step, at most


@dataclass
class _Whole:
    """What :func:`gpt2cupy.ops.accept_drafts` writes of all rows, however few a step has."""

    ids: Any
    positions: Any
    sampled_positions: Any
    history: Any
    steps: Any
    ring: Any


class DraftState(DecodeState):
    """A :class:`DecodeState` whose rows all belong to one text.

    Row 0 has its newest token, the others drafts of those that may follow. A step of 1, 2 or 4
    rows runs :meth:`first` of so many. Each of its rows pushes one token to its ring: the one
    sampled, or -1 where its draft did not stand.

    Parameters
    ----------
    model : GPT2
    cache : KVCache

    Attributes
    ----------
    sampled, sampled_positions, sampled_steps, chosen : array
        As ``ids``, ``positions``, ``steps`` and ``ring`` of the sampling, which knows no drafts.
    whole : object
        The arrays of all rows and ``history``, the text's tokens by position.
    """

    _by_row = (*DecodeState._by_row, "sampled", "sampled_positions", "sampled_steps", "chosen")

    def __init__(self, model: GPT2, cache: KVCache) -> None:
        rows = 1 + DRAFTS
        super().__init__(model, cache, rows)
        xp = self.xp
        self.sampled = xp.zeros(rows, np.int32)
        self.sampled_positions = xp.zeros(rows, np.int32)
        self.sampled_steps = xp.zeros(rows, np.uint32)
        self.chosen = xp.zeros((rows, 1, RING_ENTRY.itemsize), np.uint8)
        history = xp.zeros(cache.capacity + rows, np.int32)
        mine = self.ids, self.positions, self.sampled_positions, history, self.steps, self.ring
        self.whole = _Whole(*mine)

    def begin(self, slot: int, params: np.ndarray, plain: bool, prompt: np.ndarray) -> None:
        """Give all rows to a text whose prompt is about to end in ``slot``.

        Its first token is sampled in row 0 as in any :class:`DecodeState`.
        """
        rows = self.batch
        positions = np.arange(len(prompt), len(prompt) + rows, dtype=np.int32)
        self._write(self.sampled_positions, 0, positions)
        positions[0] -= 1  # sampling of the first token brings it there
        self.enter(0, [slot] * rows, [params] * rows, [plain] * rows, positions.tolist())
        self._write(self.whole.history, 0, prompt)

    def set_biases(self, bias: Any | None) -> None:
        """:meth:`set_bias` for all rows."""
        for row in range(self.batch):
            self.set_bias(row, bias)


def ops_draft_step(model: GPT2, state: Any) -> None:
    """Queue a step of a :class:`DraftState` as the ops of :meth:`GPT2.decode`."""
    together = _propose(state)
    rows = state.ids, state.positions, state.slots
    model.decode(*rows, state.cache, state.work, state.logits, together=together)
    _keep_what_stands(state)


def persistent_draft_step(model: GPT2, state: Any) -> None:
    """The same with :func:`persistent.forward`."""
    together = _propose(state)
    persistent.forward(model, state, together=together)
    _keep_what_stands(state)


def _propose(state: DraftState) -> bool:
    """Queue the look-up of drafts, if the step has rows for them; whether it has."""
    if state.batch > 1:
        ops.propose_drafts(state.ids, state.positions, state.whole.history)
    return state.batch > 1


def _keep_what_stands(state: DraftState) -> None:
    ops.sample(
        state.logits,
        state.vocab_size,
        state.rows,
        state.params,
        state.sampled,
        state.sampled_positions,
        state.sampled_steps,
        state.chosen,
        bias=state.bias,
        scratch=state.scratch,
        plain=state.plain,
    )
    whole = state.whole
    ops.accept_drafts(
        whole.ids,
        whole.positions,
        whole.sampled_positions,
        state.chosen,
        whole.history,
        whole.steps,
        whole.ring,
    )
