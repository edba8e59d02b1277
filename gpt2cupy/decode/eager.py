"""The decode step launched kernel by kernel: the plainest decoder, and the one to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .. import ops
from ..model import GPT2
from ..ops.core.tape import recorded
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
        self.calls: list[Callable[[], Any]] = []  # the launches of the step asked for last
        # By kind of step: what must live as long as it, its launches, and what runs them.
        self._prepared: dict[tuple[int, ...], tuple[Any, list[Any], Callable[[], None]]] = {}

    def prepare(self, state: DecodeState) -> None:
        """Make the step of ``state`` ready to run, without running it."""
        if state.xp is not np:
            self._run_of(state)

    def step(self, state: DecodeState, n: int = 1) -> None:
        """Queue ``n`` steps: feed every row its token and choose the next."""
        if state.xp is np:
            for _ in range(n):
                self._step_used_rows(state)
            return
        run = self._run_of(state)
        for _ in range(n):
            run()

    def _run_of(self, state: DecodeState) -> Callable[[], None]:
        """What runs the step of ``state`` as it is now."""
        kind = self._kind(state)
        # Identities, which stay theirs because what was prepared keeps the objects.
        key = tuple(id(part) for part in kind)
        if key not in self._prepared:
            self._prepare_model(state.batch)
            with recorded() as calls:
                self._step(state)
            self._prepared[key] = kind, calls, self._ready(calls)
        _, self.calls, run = self._prepared[key]
        return run

    def _prepare_model(self, rows: int) -> None:
        """Have the model make what its step is faster with."""
        self.model.prepare_step(rows)

    def _ready(self, calls: list[Callable[[], Any]]) -> Callable[[], None]:
        """What runs the recorded launches of a step."""

        def run() -> None:
            for call in calls:
                call()

        return run

    def _kind(self, state: DecodeState) -> tuple[Any, ...]:
        # Counts and bias appear when the first request needs them.
        return state, state.counts, state.bias, state.plain, self.model.backend

    def _step(self, state: DecodeState) -> None:
        self.model.decode(
            state.ids, state.positions, state.slots, state.cache, state.work, state.logits
        )
        choose(state, state.logits, state.rows)

    def _step_used_rows(self, state: DecodeState) -> None:
        """The step on NumPy, where idle rows cost as much as others and can be left out."""
        used = np.flatnonzero(state.slots >= 0).astype(np.int32)
        if len(used) == state.batch:
            self._step(state)
            return
        state.steps[state.slots < 0] += 1  # as on the GPU, where each row makes every step
        if not len(used):
            return
        # BLAS sums a product of one row in another order than one of several: a single row is
        # run twice, so that its bits do not depend on whether it has neighbours.
        rows = np.resize(used, max(len(used), 2))
        logits = self.model.decode(
            state.ids[rows],
            state.positions[rows],
            state.slots[rows],
            state.cache,
            state.work.first(len(rows)),
            state.scratch[: len(rows)],
        )
        state.logits[rows] = logits
        choose(state, logits[: len(used)], used)


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
        plain=state.plain,
    )
