"""The decode step launched kernel by kernel: the plainest decoder, and the one to compare with."""

from __future__ import annotations

from .. import ops
from ..model import GPT2
from .state import DecodeState


class EagerDecoder:
    """Runs the step of a :class:`DecodeState` by launching its kernels one after another."""

    name = "eager"

    def __init__(self, model: GPT2) -> None:
        self.model = model

    def prepare(self, state: DecodeState) -> None:
        """Nothing to build: every launch is made at each step."""

    def step(self, state: DecodeState, n: int = 1) -> None:
        """Queue ``n`` steps: feed every row its token and choose the next."""
        for _ in range(n):
            self.model.decode(
                state.ids, state.positions, state.slots, state.cache, state.work, state.logits
            )
            choose(state, state.logits, state.rows)


def choose(state: DecodeState, logits: object, rows: object) -> None:
    """Queue the choice of the next token of ``rows``, one per line of ``logits``."""
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
    )
