"""Look-up speculation: the rows of one text, and how many of them a step has."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from ..decode import DRAFTS, Decoder, DraftState, decoder
from .rows import Queued, Rows
from .scheduler import Sequence

# By the hit rate, the share of tokens that a look-up would have found: rows of a step. Four rows
# of 1558M take 1.25 times as long as one, of 124M 1.5 times.
_ROWS = ((0.6, 1 + DRAFTS), (0.45, 2), (0.0, 1))
_LEAST_TOKENS = {1 + DRAFTS: 1.6, 2: 1.3}  # tokens that such a step must bring on average
_EXPECTED = 2.25  # and those that it is expected to bring at first
_MEMORY = 8  # tokens over which the hit rate is averaged
_STEPS = 4  # steps over which the tokens of a step are
_TAIL = 32  # tokens of the prompt from which the first hit rate is taken
# Tokens without drafts after steps that brought too few: at first, and at most, doubled each time.
_PAUSE = 16, 256


class DraftPolicy:
    """How many rows a step should have, from the text so far.

    Drafts begin where the tokens that followed the last two before would often have been right;
    the device looks for longer matches too, and finds no fewer. They pause where steps with
    drafts bring too few tokens. All of it is a function of the tokens and of the steps that
    brought them, so the same text has the same steps on every run.
    """

    def __init__(self, prompt: np.ndarray) -> None:
        self.hit_rate = 0.0
        self._brought = _EXPECTED  # tokens of a step with drafts, on average
        self._pause, self._left = _PAUSE[0], 0
        ids = prompt.tolist()
        self._after = dict(zip(pairwise(ids), ids[2:], strict=False))
        self._last = tuple(ids[-2:])
        # What each of the last tokens would have been guessed from what stands before it.
        start = max(len(ids) - _TAIL, 2)
        seen = dict(zip(pairwise(ids[:start]), ids[2:start], strict=False))
        for place in range(start, len(ids)):
            pair = ids[place - 2], ids[place - 1]
            self._count(seen.get(pair) == ids[place])
            seen[pair] = ids[place]

    def _count(self, found: bool) -> None:
        self.hit_rate += (found - self.hit_rate) / _MEMORY

    def push(self, ids: list[int], rows: int) -> None:
        """Take the tokens that a step of so many rows brought."""
        for id_ in ids:
            self._count(self._after.get(self._last) == id_)
            if len(self._last) == 2:
                self._after[self._last] = id_
            self._last = *self._last[-1:], id_
        if rows == 1:
            self._left -= 1
            return
        self._brought += (len(ids) - self._brought) / _STEPS
        if self._brought < _LEAST_TOKENS[rows]:
            self._left, self._brought = self._pause, _EXPECTED
            self._pause = min(2 * self._pause, _PAUSE[1])
        elif self._brought > _EXPECTED:
            self._pause = _PAUSE[0]

    @property
    def rows(self) -> int:
        """Rows that the next step should have."""
        if self._left > 0:
            return 1
        return next(rows for least, rows in _ROWS if self.hit_rate >= least)


class DraftRows:
    """In place of :class:`Rows`, the rows of one text that speculates.

    Parameters
    ----------
    plain : Rows
        Whose model, cache, path and count of steps it shares.
    """

    most_lead = 1  # what a step brings is not known before it is read

    def __init__(self, plain: Rows) -> None:
        self._plain = plain
        self.model = plain.model
        self.state = DraftState(plain.model, plain.state.cache)
        self._decoders: dict[int, Decoder] = {}
        self._counts = np.zeros(self.state.batch, np.int64)  # the host's count of state.steps
        self._policy = DraftPolicy(np.zeros(1, np.int32))
        self._width = 1  # rows of what was queued last
        self._waits = False  # whether a bias keeps ends back, which is lifted at a known token

    @property
    def steps(self) -> int:
        """Decode steps queued so far, of both kinds."""
        return self._plain.steps

    def enter(self, sequences: list[Sequence]) -> None:
        """Write the settings of the text whose prompt is about to end."""
        (sequence,) = sequences
        request = sequence.request
        first, *others = request.held_back or (-1,)
        params = request.params.row(request.index, len(request.prompt), first)
        self.state.begin(sequence.slot, params, request.params.plain, request.prompt)
        bias = {**request.params.logit_bias, **dict.fromkeys(others, -math.inf)}
        self.state.set_biases(bias)
        self._waits = bool(others)
        self._policy = DraftPolicy(request.prompt)
        self._width = 1

    def release(self, first: int, end: int) -> None:
        """Leave all rows to nobody."""
        self.state.release(0, self.state.batch)

    def set_bias(self, row: int, bias: Any | None) -> None:
        """Give the text its logit bias: no end is kept back any more."""
        self.state.set_biases(bias)
        self._waits = False

    def record(self, running: int, *, first: bool) -> None:
        """Record a step, so that its kernels compile side by side."""
        self._decoder(1).record(self.state.first(1))

    def step(self, running: int) -> None:
        """Queue a step of as many rows as have been worth it lately."""
        self._width = 1 if self._waits else self._policy.rows
        self._decoder(self._width).step(self.state.first(self._width))
        self._plain.steps += 1

    def _decoder(self, rows: int) -> Decoder:
        if rows not in self._decoders:
            self._decoders[rows] = decoder(self.model, self._plain.path, rows, drafting=True)
        return self._decoders[rows]

    def asked(self, rows: slice, numbers: np.ndarray, top: int) -> Queued:
        """Note what the step that was queued last will bring: at most a token of each row."""
        rows = slice(0, self._width)
        stamps = self._counts[rows].copy()
        queued = Queued(self, self.steps, rows, stamps, numbers.repeat(self._width))
        queued.drafts = self._width - 1
        self._counts[rows] += 1
        if top:
            queued.top = self._plain.queue_top(self.state, rows, top)
        return queued

    def read(self, queued: Queued) -> tuple[np.ndarray, np.ndarray, Any]:
        """Wait for the tokens that stand; as :meth:`Rows.read`."""
        ids, logprobs = self.state.read_rows(queued.rows, queued.stamps)
        count = int((ids >= 0).sum())
        self._policy.push(ids[:count].tolist(), len(ids))
        top = queued.read_top()
        if top is not None:
            top = top[0][:count], top[1][:count]
        return ids[:count], logprobs[:count], top

    def recover(self) -> None:
        """After an error in mid-step: it may have come between a step and its count."""
        steps = self.state.steps
        self._counts[:] = steps if self.model.xp is np else steps.get()
