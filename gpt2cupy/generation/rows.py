"""Rows of an engine's decode step: what is queued on the device, and where tokens arrive."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .. import ops
from ..cache import KVCache
from ..decode import Decoder, DecodeState, decoder, sample_first
from ..decode.state import RING
from ..decode.step import sample_next
from ..model import GPT2
from ..ops.core.tape import recorded
from .scheduler import Sequence, bucket


class Queued:
    """Tokens that the device was asked to choose, and where they will be found.

    Attributes
    ----------
    source : object
        What reads them: :class:`Rows`, or what stands in its place.
    step : int
        Decode steps that were queued up to then.
    rows : slice
    stamps : numpy.ndarray of int64 [N]
        Number of the token in the token ring of each row.
    numbers : numpy.ndarray of int64 [N]
        Line of :class:`gpt2cupy.generation.results.Results` of each.
    top : tuple or None
        The most probable tokens, on their way to the host.
    drafts : int
        How many of the rows may bring no token, since they verify drafts of row 0's text; -1
        where each row is a text of its own.
    """

    drafts = -1

    def __init__(
        self, source: Any, step: int, rows: slice, stamps: np.ndarray, numbers: np.ndarray
    ) -> None:
        self.source = source
        self.step = step
        self.rows = rows
        self.stamps = stamps
        self.numbers = numbers
        self.top: tuple[Any, ...] | None = None

    def read_top(self) -> Any:
        """Wait for the most probable tokens and their log-probabilities, or None."""
        if self.top is None:
            return None
        event, top, _ = self.top
        if event is not None:
            event.synchronize()
        return top


class Rows:
    """State and decoders of up to ``slots`` rows, each a text; a step runs as many as are in use.

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
    decoders : dict of int to Decoder
        What runs steps of so many rows, made when first needed.
    """

    most_lead = RING // 2 - 2  # steps that may be queued: a row's ring takes two tokens of each

    def __init__(self, model: GPT2, cache: KVCache, path: str) -> None:
        self.model = model
        self.path = path
        self.state = DecodeState(model, cache, cache.slots)
        self.steps = 0
        self.decoders: dict[int, Decoder] = {}
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
        if rows not in self.decoders:
            partial = self.path == "auto" and rows < self.state.batch
            self.decoders[rows] = decoder(self.model, "graph" if partial else self.path, rows)
        return self.decoders[rows]

    def asked(self, rows: slice, numbers: np.ndarray, top: int) -> Queued:
        """Note that the device was asked for a token of each of some rows.

        Parameters
        ----------
        rows : slice
        numbers : numpy.ndarray of int64 [N]
        top : int
            How many of the most probable tokens are wanted with each.
        """
        queued = Queued(self, self.steps, rows, self._counts[rows].copy(), numbers)
        self._counts[rows] += 1
        if top:
            queued.top = self.queue_top(self.state, rows, top)
        return queued

    def queue_top(self, state: DecodeState, rows: slice, count: int) -> tuple[Any, ...]:
        """Queue the search for the most probable tokens of some rows of a state."""
        count = min(count, state.vocab_size)
        found = ops.top_logprobs(state.logits[rows], state.vocab_size, count)
        if self.model.xp is np:
            return None, found, found
        host = tuple(map(state.to_host, found))
        event = self.model.xp.cuda.Event(disable_timing=True)
        event.record()
        return event, host, found  # what is copied lives until it has been

    def read(self, queued: Queued) -> tuple[np.ndarray, np.ndarray, Any]:
        """Wait for ids, log-probabilities and the most probable tokens, or None."""
        ids, logprobs = self.state.read_rows(queued.rows, queued.stamps)
        return ids, logprobs, queued.read_top()

    def process(self, sequence: Sequence, text: np.ndarray) -> None:
        """Let a request's own function change the logits of its row, and sample once more.

        Waits for the device.

        Parameters
        ----------
        sequence : Sequence
        text : numpy.ndarray of int32 [T]
            Its tokens before the one that was just sampled.
        """
        state, row, request = self.state, sequence.row, sequence.request
        line, change = slice(row, row + 1), request.params.logits_processor
        assert change is not None
        ids = np.concatenate([request.prompt, text])
        logits = state.logits[line, : state.vocab_size]
        if (changed := change(ids, logits[0])) is not None:
            logits[0] = changed
        state.step_back(row, len(ids) - 1)
        sample_next(state, state.logits[line], state.rows[line])
        self._counts[row] += 1

    def release(self, first: int, end: int) -> None:
        """Leave rows to nobody."""
        self.state.release(first, end)

    def set_bias(self, row: int, bias: Any | None) -> None:
        """Give a row its logit bias."""
        self.state.set_bias(row, bias)

    def recover(self) -> None:
        """After an error in mid-step: it may have come between a step and its count."""
        steps = self.state.steps
        self._counts[:] = steps if self.model.xp is np else steps.get()
