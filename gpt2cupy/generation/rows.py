"""Rows of an engine's decode step: what is queued on the device, and where tokens arrive."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import ops
from ..cache import KVCache
from ..decode import Decoder, DecodeState, decoder, sample_first
from ..model import GPT2
from ..ops.core.tape import recorded
from .scheduler import Sequence, bucket


class Queued:
    """Tokens that the device was asked to choose, and where they will be found.

    Attributes
    ----------
    step : int
        Decode steps that were queued up to then.
    rows : slice
    stamps : numpy.ndarray of int64 [N]
        Number of the token in the token ring of each row.
    numbers : numpy.ndarray of int64 [N]
        Line of :class:`gpt2cupy.generation.results.Results` of each.
    top : tuple or None
        The most probable tokens, on their way to the host.
    """

    def __init__(self, step: int, rows: slice, stamps: np.ndarray, numbers: np.ndarray) -> None:
        self.step = step
        self.rows = rows
        self.stamps = stamps
        self.numbers = numbers
        self.top: tuple[Any, ...] | None = None


class Rows:
    """State and decoders of up to ``slots`` rows; a step runs as many as are in use.

    Parameters
    ----------
    model : GPT2
    cache : KVCache
    path : str
        Decode path, or "auto".

    Attributes
    ----------
    state : DecodeState
        Of all rows.
    steps : int
        Decode steps queued so far.
    """

    def __init__(self, model: GPT2, cache: KVCache, path: str) -> None:
        self.model = model
        self.path = path
        self.state = DecodeState(model, cache, cache.slots)
        self.steps = 0
        self._decoders: dict[int, Decoder] = {}
        if path != "auto":
            self.decoder(cache.slots)  # refuses a path that is not there
        self._counts = np.zeros(cache.slots, np.int64)  # the host's count of state.steps

    def enter(self, sequences: list[Sequence]) -> None:
        """Write the settings of neighbouring rows whose prompts are about to end."""
        requests = [sequence.request for sequence in sequences]
        # The kernel keeps one end from being chosen too early, a bias the others.
        held_back = [request.held_back or (-1,) for request in requests]
        self.state.enter(
            sequences[0].row,
            [sequence.slot for sequence in sequences],
            [
                r.params.row(r.index, len(r.prompt), first)
                for r, (first, *_) in zip(requests, held_back, strict=True)
            ],
            [r.params.plain for r in requests],
            [len(r.prompt) - 1 for r in requests],
        )
        for sequence, (_, *others) in zip(sequences, held_back, strict=True):
            params, prompt = sequence.request.params, sequence.request.prompt
            counted = prompt if params.counts_tokens else None
            bias = {**params.logit_bias, **dict.fromkeys(others, -math.inf)}
            self.state.set_processors(sequence.row, counted, bias)

    def record(self, running: int, *, first: bool) -> None:
        """Record a step, and the choice of first tokens, so that kernels compile side by side."""
        if self.model.xp is not np and first:
            with recorded():
                sample_first(self.model, self.state, self.state.work.x[:running], 0)
        count = self._count(running)
        self.decoder(count).record(self.state.first(count))

    def sample_first(self, x: Any, row: int) -> None:
        """Queue the first tokens of neighbouring rows; ``x`` as in :func:`decode.sample_first`."""
        sample_first(self.model, self.state, x, row)

    def step(self, running: int) -> None:
        """Queue a decode step of the first ``running`` rows."""
        count = self._count(running)
        self.decoder(count).step(self.state.first(count))
        self.steps += 1
        self._counts[running:count] += 1

    def _count(self, running: int) -> int:
        """Rows of the step that runs so many; NumPy leaves idle rows out by itself."""
        batch = self.state.batch
        return batch if self.model.xp is np else bucket(running, batch)

    def decoder(self, rows: int) -> Decoder:
        """What runs steps of so many rows.

        Which path is the fastest is looked up or measured for all slots alone: fewer rows take
        the captured graph, so that no run depends on a measurement in it.
        """
        if rows not in self._decoders:
            partial = self.path == "auto" and rows < self.state.batch
            self._decoders[rows] = decoder(self.model, "graph" if partial else self.path, rows)
        return self._decoders[rows]

    def asked(self, rows: slice, numbers: np.ndarray, top: int) -> Queued:
        """Note that the device was asked for a token of each of some rows.

        Parameters
        ----------
        rows : slice
        numbers : numpy.ndarray of int64 [N]
        top : int
            How many of the most probable tokens are wanted with each.
        """
        queued = Queued(self.steps, rows, self._counts[rows].copy(), numbers)
        self._counts[rows] += 1
        if top:
            queued.top = self._queue_top(rows, min(top, self.state.vocab_size))
        return queued

    def _queue_top(self, rows: slice, count: int) -> tuple[Any, ...]:
        found = ops.top_logprobs(self.state.logits[rows], self.state.vocab_size, count)
        if self.model.xp is np:
            return None, found, found
        host = tuple(map(self.state.to_host, found))
        event = self.model.xp.cuda.Event(disable_timing=True)
        event.record()
        return event, host, found  # what is copied lives until it has been

    def read(self, queued: Queued) -> tuple[np.ndarray, np.ndarray, Any]:
        """Wait for ids, log-probabilities and the most probable tokens, or None."""
        ids, logprobs = self.state.read_rows(queued.rows, queued.stamps)
        if queued.top is None:
            return ids, logprobs, None
        event, top, _ = queued.top
        if event is not None:
            event.synchronize()
        return ids, logprobs, top

    def recover(self) -> None:
        """After an error in mid-step: it may have come between a step and its count."""
        steps = self.state.steps
        self._counts[:] = steps if self.model.xp is np else steps.get()
