"""The decode step launched kernel by kernel: the plainest decoder, and the one to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import ops
from ..model import GPT2
from ..ops.launch import recorded
from .state import DecodeState


class EagerDecoder:
    """Runs the step of a :class:`DecodeState` by launching its kernels one after another.

    The launches of a step are the same every time, for all that changes lies in
    device memory. So they are checked once, in :meth:`prepare`, and a step makes
    the bare launches: about 4 us of host time each instead of 11.
    """

    name = "eager"

    def __init__(self, model: GPT2) -> None:
        self.model = model
        self.calls: list[Callable[[], Any]] = []
        self.prepared_for: tuple[Any, ...] = ()

    def prepare(self, state: DecodeState) -> None:
        """Check and keep the launches of one step of ``state``."""
        if state.xp is not np:
            with recorded() as self.calls:
                self._step(state)
            self.prepared_for = self._key(state)

    def step(self, state: DecodeState, n: int = 1) -> None:
        """Queue ``n`` steps: feed every row its token and choose the next."""
        if state.xp is np:
            for _ in range(n):
                self._step(state)
            return
        key = self._key(state)
        if len(self.prepared_for) != len(key) or any(
            a is not b for a, b in zip(self.prepared_for, key, strict=True)
        ):
            self.prepare(state)
        for _ in range(n):
            for call in self.calls:
                call()

    def _key(self, state: DecodeState) -> tuple[Any, ...]:
        # Counts and bias appear when the first request needs them.
        return state, state.counts, state.bias, self.model.gemv

    def _step(self, state: DecodeState) -> None:
        self.model.decode(
            state.ids, state.positions, state.slots, state.cache, state.work, state.logits
        )
        choose(state, state.logits, state.rows)


def choose(state: DecodeState, logits: Any, rows: Any) -> None:
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
