"""The only generation loop: slots, admission, stop conditions.

A stream is an engine with one slot, a list an engine with many; sequences enter
as slots become free. Each step is queued before the tokens of the last are
read, so the GPU does not wait for Python.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from .. import ops
from ..decode import Decoder, DecodeState, PromptRunner, decoder, sample_first
from ..errors import BusyError, ClosedError
from ..model import GPT2
from ..ops.core.device import device_errors, memory_error
from ..ops.core.tape import recorded
from ..sampling import SamplingParams
from . import forks
from .request import Request, Token

PREFILL_ROWS = 1024  # prompt tokens run at once; longer prompts come in pieces


class _Sequence:
    """A request that holds a row."""

    def __init__(self, request: Request, row: int, limit: int) -> None:
        self.request = request
        self.row = row
        self.limit = limit  # tokens it may still choose in all
        self.first = 0  # ring step of its first token
        self.queued = 0  # tokens chosen or about to be
        self.read = 0  # tokens handed out
        self.frees_ends = False  # whether its bias keeps ends back until min_new_tokens


class Engine:
    """Continues many requests over a fixed number of slots.

    Parameters
    ----------
    model : GPT2
    slots : int
        Sequences generated at once.
    capacity : int, optional
        Tokens of prompt and continuation per slot; ``n_positions`` by default.
    decode : {"auto", "eager", "graph", "persistent"}, optional
        How a step is run; ``model.decode_path`` by default.
    """

    def __init__(
        self, model: GPT2, slots: int = 1, capacity: int | None = None, *, decode: str | None = None
    ) -> None:
        self.model = model
        self._free = threading.Lock()  # until a run has ended
        self._forks = 0  # since it was made: a run that began before is the parent's
        forks.watch(self)
        self.active: dict[int, _Sequence] = {}
        self.device: Any = contextlib.nullcontext()
        self.stream: Any = contextlib.nullcontext()
        path = decode or model.decode_path
        if model.xp is np:
            self._allocate(path, slots, capacity)
            return
        cupy = model.xp
        # The device first: a stream belongs to the one that is current when it is made.
        self.device = model.weights.wte.device
        with self.device:
            self.stream = cupy.cuda.Stream(non_blocking=True)
            try:
                with self.stream:
                    self._allocate(path, slots, capacity)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise memory_error(error, f"a cache of {slots} slots") from error

    def _allocate(self, path: str, slots: int, capacity: int | None) -> None:
        self._path = path
        if path != "auto":
            self.decoder = decoder(self.model, path, slots)  # refuses a path that is not there
        self._started = False  # whether it ever ran a prompt
        self.backend = self.model.backend  # which the decoder was chosen for
        self.cache = self.model.new_cache(slots, capacity)
        self.state = DecodeState(self.model, self.cache, slots)
        rows = min(PREFILL_ROWS, slots * self.cache.capacity)
        self.prefill_work = self.model.new_workspace(rows)
        graphs = path != "eager"
        self.prompts = PromptRunner(self.model, self.cache, self.prefill_work, graphs=graphs)
        self.row_steps = np.zeros(slots, np.int64)  # the host's count of state.steps

    @functools.cached_property
    def decoder(self) -> Decoder:
        """What runs a step. Which path is the fastest is looked up or measured at first need."""
        on_gpu = self.model.xp is not np
        with (
            self._on_device(),
            device_errors("a decode path") if on_gpu else contextlib.nullcontext(),
        ):
            return decoder(self.model, self._path, self.slots)

    @property
    def slots(self) -> int:
        return self.state.batch

    def after_fork(self) -> None:
        """In a child: the parent's run goes on there, and CUDA is not here."""
        self._forks += 1
        self._free = threading.Lock()
        self.active = {}

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """The engine's device and stream, left again before control returns to the caller."""
        with self.device, self.stream:
            if self.model.xp is not np:
                yield
                return
            # NumPy would warn of an overflow; sampling marks what comes of it.
            with np.errstate(over="ignore", invalid="ignore"):
                yield

    def run(self, requests: Iterable[Request]) -> Iterator[Token]:
        """Generate until every request is finished, yielding tokens as they are chosen.

        Dropping a request from outside is done by :meth:`drop`.

        Raises
        ------
        BusyError
            If requests of an earlier call are still running, in this thread or
            another. Engines of one model may run side by side.
        ClosedError
            If it goes on after a fork, in the child.
        DeviceError
            If it begins in a child of the process that has the GPU.
        """
        if self._forks and self.model.xp is not np:
            raise forks.no_gpu_here("Engine.run")
        free = self._free
        if not free.acquire(blocking=False):
            raise BusyError(
                "this engine is running other requests",
                where="Engine.run",
                remedy="Finish or close() the first run, or make one more Engine of the model.",
            )
        try:
            yield from self._run(requests)
        finally:
            free.release()

    def _run(self, requests: Iterable[Request]) -> Iterator[Token]:
        waiting = deque(requests)
        self.active = {}
        begun = self._forks
        if begun:  # it may have come in the middle of a step
            self.row_steps[:] = self.state.steps
        # NumPy runs a step when it is queued: a token must be out before the next step.
        at_once = self.model.xp is np
        try:
            while waiting or self.active:
                with self._on_device():
                    self._admit(waiting)
                    sequences = list(self.active.values())
                    wants_top = any(s.request.params.logprobs for s in sequences)
                    if not (wants_top or at_once):
                        self._step()
                    tokens = [self._read(s, self._top(s)) for s in sequences]
                    if wants_top and not at_once:
                        # The step overwrites the logits, which had to be looked at first.
                        self._step()
                for token in tokens:
                    if token is not None:
                        yield token
                        self._check_process(begun)
                if at_once:
                    with self._on_device():
                        self._step()
        except GeneratorExit:
            raise
        except BaseException:
            if begun != self._forks:
                raise
            # It may have come between a step and its count, and the next run reads by the count.
            with self._on_device():
                steps = self.state.steps
                self.row_steps[:] = steps if self.model.xp is np else steps.get()
            raise
        finally:
            if begun == self._forks:
                with self._on_device():
                    for row in list(self.active):
                        self._release(row)

    def _check_process(self, begun: int) -> None:
        """Refuse to go on with a run of the parent's in a child."""
        if begun != self._forks:
            raise ClosedError(
                "this run began before the process was forked",
                where="Engine.run",
                remedy="Start it again here.",
            )

    def drop(self, key: Any) -> None:
        """End a running request from outside, for instance at a stop string."""
        for row, sequence in list(self.active.items()):
            if sequence.request.key == key:
                with self._on_device():
                    self._release(row)

    def _admit(self, waiting: deque[Request]) -> None:
        """Give free rows to waiting requests, run their prompts and choose their first tokens."""
        admitted = []
        for row in range(self.slots):
            if row not in self.active and waiting:
                request = waiting.popleft()
                limit = request.params.limit(self.cache.capacity - len(request.prompt) + 1)
                sequence = _Sequence(request, row, limit)
                self.active[row] = sequence
                self._enter(sequence)
                admitted.append(sequence)
        rest = {s.row: s.request.prompt for s in admitted}
        while rest:
            self._prefill_piece(rest)

    def _enter(self, sequence: _Sequence) -> None:
        request, row = sequence.request, sequence.row
        params = request.params
        self.cache.reset(row)
        # The kernel keeps one end from being chosen too early, a bias the others.
        first, *others = request.held_back or (-1,)
        settings = params.row(request.index, len(request.prompt), first)
        self.state.assign(row, row, settings, params.plain)
        counted = request.prompt if params.counts_tokens else None
        bias = {**params.logit_bias, **dict.fromkeys(others, -math.inf)}
        self.state.set_processors(row, counted, bias)
        sequence.frees_ends = bool(others)
        self.state.seek(row, len(request.prompt) - 1)

    def _prefill_piece(self, rest: dict[int, np.ndarray]) -> None:
        """Run as many waiting prompt tokens as fit, packed; remove what was run from ``rest``."""
        budget = self.prefill_work.rows
        piece: dict[int, np.ndarray] = {}
        for row, tokens in rest.items():
            if budget:
                piece[row] = tokens[:budget]
                budget -= len(piece[row])
        rows = list(piece)
        # One sequence in an engine for one, to its end: the same graph chooses its first token.
        alone = self.slots == 1 and len(piece[0]) == len(rest[0])
        if not self._started:
            self._start(sum(map(len, piece.values())), len(piece), alone)
        x = self.prompts.run(list(piece.values()), rows, self.state if alone else None)
        done = []
        for index, row in enumerate(rows):
            rest[row] = rest[row][len(piece[row]) :]
            if not len(rest[row]):
                del rest[row]
                done.append((row, index))
        for row, index in done:
            if not alone:
                sample_first(self.model, self.state, x[index : index + 1], row)
            sequence = self.active[row]
            sequence.first = int(self.row_steps[row])
            sequence.queued = 1
            self.row_steps[row] += 1

    def _start(self, total: int, sequences: int, alone: bool) -> None:
        """Record all that the first tokens need, so that its kernels are compiled side by side."""
        self.prompts.record(total, sequences, self.state if alone else None)
        if self.model.xp is not np and not alone:
            with recorded():
                sample_first(self.model, self.state, self.state.work.x[:1], 0)
        self.decoder.record(self.state)
        self._started = True

    def _step(self) -> None:
        """Queue one step for all rows, unless every sequence has its last token queued."""
        wanting = [s for s in self.active.values() if s.queued < s.limit]
        if not wanting:
            return
        for sequence in wanting:
            params = sequence.request.params
            if sequence.frees_ends and sequence.queued == params.min_new_tokens:
                self.state.set_bias(sequence.row, params.logit_bias)
        self.decoder.step(self.state)
        self.row_steps += 1
        for sequence in self.active.values():
            sequence.queued += 1
            row = sequence.row
            self.cache.lengths[row] = min(self.cache.lengths[row] + 1, self.cache.capacity)

    def _top(self, sequence: _Sequence) -> list[tuple[int, float]]:
        count = sequence.request.params.logprobs
        if not count:
            return []
        logits = self.state.logits[sequence.row : sequence.row + 1]
        count = min(count, self.state.vocab_size)
        ids, logprobs = ops.top_logprobs(logits, self.state.vocab_size, count)
        if self.model.xp is not np:
            ids, logprobs = ids.get(), logprobs.get()
        return list(zip(ids[0].tolist(), logprobs[0].tolist(), strict=True))

    def _read(self, sequence: _Sequence, top: list[tuple[int, float]]) -> Token | None:
        """Wait for a sequence's next token and end the sequence if it is the last."""
        if self.active.get(sequence.row) is not sequence:
            return None
        request = sequence.request
        token, logprob = self.state.read(sequence.row, sequence.first + sequence.read)
        sequence.read += 1
        reason = None
        if math.isnan(logprob):  # how sampling marks logits that are not finite
            reason = "error"
        elif token in request.ends:
            reason = "eos"
        elif token in request.params.stop_token_ids:
            reason = "stop"
        elif sequence.read >= sequence.limit:
            reason = "length"
        if reason:
            self._release(sequence.row)
        return Token(request.key, token, logprob, reason, top)

    def _release(self, row: int) -> None:
        self.active.pop(row, None)
        self.state.assign(row, -1, SamplingParams().row(0, 0, -1))
        self.cache.reset(row)
