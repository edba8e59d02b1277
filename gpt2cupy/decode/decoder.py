"""Decoder: a step function, and how its launches are replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..model import GPT2
from ..ops.core.tape import load, recorded
from ..shifts import NormShifts
from .state import DecodeState
from .step import StepFunction

# From the recorded launches of a step to what runs them all on the current stream.
Replay = Callable[[list[Callable[[], Any]]], Callable[[], None]]


def launched(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """Replay of recorded launches one after another: about 4 us of host time each."""
    load(calls)

    def run() -> None:
        for call in calls:
            call()

    return run


@dataclass
class _Prepared:
    """A step of one kind."""

    kind: Any  # what must live as long as it
    calls: list[Callable[[], Any]]  # its launches
    shifts: NormShifts | None  # what they read that must be made before
    run: Callable[[], None] | None = None  # what runs them, once their kernels are there


def sampling_of(state: DecodeState) -> tuple[Any, ...]:
    """What the launches of a state's sampling depend on.

    Counts and bias appear when the first request needs them; no more than a temperature has no
    use for them.
    """
    plain = state.plain
    processors = (None, None) if plain else (state.counts, state.bias)
    return state, *processors, plain


class Decoder:
    """Runs the step of a :class:`DecodeState`.

    On the GPU the launches of a step are the same every time, for all that changes lies in device
    memory. So they are checked and recorded once, in :meth:`prepare`, and replayed from then on.
    NumPy runs the step function itself.

    Parameters
    ----------
    model : GPT2
    function : StepFunction
        What a step computes: :func:`gpt2cupy.decode.ops_step`, or
        :func:`gpt2cupy.decode.persistent_step`.
    replay : callable
        :func:`launched`, or :func:`gpt2cupy.decode.captured`: one launch of a graph a step.
    name : str
        Of the decode path, for reports.
    by_ops : bool
        Whether the function is :meth:`GPT2.decode`, which has shifts of its norms for one row.

    Attributes
    ----------
    calls : list of callable
        The recorded launches of the step asked for last.
    """

    def __init__(
        self,
        model: GPT2,
        function: StepFunction,
        replay: Replay,
        name: str,
        *,
        by_ops: bool = False,
    ) -> None:
        self.model = model
        self.function = function
        self.by_ops = by_ops
        self.replay = replay
        self.name = name
        self.calls: list[Callable[[], Any]] = []
        self._prepared: dict[tuple[int, ...], _Prepared] = {}  # by kind of step

    def record(self, state: DecodeState) -> None:
        """Record the step of ``state``: its kernels are compiled from now on, beside others."""
        if state.xp is not np:
            self._recorded(state)

    def prepare(self, state: DecodeState) -> None:
        """Make the step of ``state`` ready to run, without running it."""
        if state.xp is not np:
            self._run_of(state)

    def step(self, state: DecodeState, n: int = 1) -> None:
        """Queue ``n`` steps: feed every row its token and sample the next."""
        if state.xp is np:
            for _ in range(n):
                self.function(self.model, state)
            return
        run = self._run_of(state)
        for _ in range(n):
            run()

    def _run_of(self, state: DecodeState) -> Callable[[], None]:
        """What runs the step of ``state`` as it is now."""
        prepared = self._recorded(state)
        if prepared.run is None:
            if prepared.shifts is not None:
                prepared.shifts.make(state.xp)
            prepared.run = self.replay(prepared.calls)
        self.calls = prepared.calls
        return prepared.run

    def _recorded(self, state: DecodeState) -> _Prepared:
        kind = *sampling_of(state), self.model.backend
        # Identities, which stay theirs because what was prepared keeps the objects.
        key = tuple(id(part) for part in kind)
        if key not in self._prepared:
            shifts = None
            if self.by_ops and state.batch == 1:
                shifts = self.model.shifts
                shifts.record(state.xp)
            with recorded() as calls:
                self.function(self.model, state)
            self._prepared[key] = _Prepared(kind, calls, shifts)
        return self._prepared[key]
