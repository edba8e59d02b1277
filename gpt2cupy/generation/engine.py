"""The open engine: requests enter and leave while others run; what comes back is arrays.

One :meth:`Engine.step` admits what waits, runs a piece of prompts, queues one decode step and
returns what an earlier one brought. On a GPU ``LEAD`` steps are queued ahead, so that the GPU does
not wait for Python. An end of text is therefore acted upon ``LEAD`` steps after it was chosen;
what was computed past it is thrown away and counted. The scheduler alone decides who runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np

from ..decode import Decoder, DecodeState, PromptRunner
from ..decode.state import RING
from ..errors import BusyError, ClosedError, InputError, shown
from ..model import GPT2
from ..ops.core.device import device_errors, memory_error
from . import forks
from .request import Request, Token
from .results import Block, Results, merged, tokens_of
from .rows import Queued, Rows
from .scheduler import Piece, Scheduler, Sequence

PREFILL_ROWS = 1024  # prompt tokens run between two decode steps
_END: Any = object()  # of an iterator
LEAD = 3  # decode steps queued before the oldest is read, on a GPU


class Engine:
    """Continues many requests over a fixed number of slots.

    :meth:`submit` and :meth:`cancel` may be called from any thread at any time; :meth:`step`
    and what loops over it, from one thread at a time.

    Parameters
    ----------
    model : GPT2
    slots : int
        Sequences generated at once.
    capacity : int, optional
        Tokens of prompt and continuation per slot; ``n_positions`` by default.
    decode : {"auto", "eager", "graph", "persistent"}, optional
        How a step is run; ``model.decode_path`` by default.
    lead : int, optional
        Decode steps queued before the oldest is read, 0 to 6: 3 on a GPU, none on NumPy,
        which runs a step when it is queued.

    Attributes
    ----------
    discarded : int
        Tokens that were computed past the end of their text.
    """

    def __init__(
        self,
        model: GPT2,
        slots: int = 1,
        capacity: int | None = None,
        *,
        decode: str | None = None,
        lead: int | None = None,
    ) -> None:
        self.model = model
        self._free = threading.Lock()  # until a run has ended
        self._forks = 0  # since it was made: a run that began before is the parent's
        forks.watch(self)
        self.device: Any = contextlib.nullcontext()
        self.stream: Any = contextlib.nullcontext()
        self._lead = (0 if model.xp is np else LEAD) if lead is None else _checked_lead(lead)
        if model.xp is np:
            self._allocate(slots, capacity, decode)
            return
        cupy = model.xp
        # The device first: a stream belongs to the one that is current when it is made.
        self.device = model.weights.wte.device
        with self.device:
            self.stream = cupy.cuda.Stream(non_blocking=True)
            try:
                with self.stream:
                    self._allocate(slots, capacity, decode)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise memory_error(error, f"a cache of {slots} slots") from error

    def _allocate(self, slots: int, capacity: int | None, path: str | None) -> None:
        self.cache = self.model.new_cache(slots, capacity)
        self.rows = Rows(self.model, self.cache, path or self.model.decode_path)
        self.backend = self.model.backend  # which the decoder was chosen for
        rows = min(PREFILL_ROWS, slots * self.cache.capacity)
        self.prefill_work = self.model.new_workspace(rows)
        graphs = self.rows.path != "eager"
        self.prompts = PromptRunner(self.model, self.cache, self.prefill_work, graphs=graphs)
        self.scheduler = Scheduler(slots, rows)
        self.results = Results(self.cache.capacity + 1)
        self.discarded = 0
        self._started = False  # whether it ever ran a prompt
        self._submitted: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._by_key: dict[Any, Sequence] = {}
        self._queued: deque[Queued] = deque()
        self._closing: deque[tuple[int, Sequence]] = deque()  # lines to close after a step
        self._held_back: list[Sequence] = []  # whose bias keeps ends back until min_new_tokens

    @property
    def slots(self) -> int:
        return self.cache.slots

    @property
    def state(self) -> DecodeState:
        """Of all rows."""
        return self.rows.state

    @property
    def decoder(self) -> Decoder:
        """What runs a step of all rows; the fastest path is looked up or measured at first need."""
        on_gpu = self.model.xp is not np
        with (
            self._on_device(),
            device_errors("a decode path") if on_gpu else contextlib.nullcontext(),
        ):
            return self.rows.decoder(self.slots)

    def after_fork(self) -> None:
        """In a child: the parent's run goes on there, and CUDA is not here."""
        self._forks += 1
        self._free = threading.Lock()
        if self.model.xp is np:
            self._clear()
            self.rows.recover()  # it may have come in the middle of a step

    # -- what may be called from any thread --------------------------------------------------------

    def submit(self, request: Request) -> Any:
        """Let a request wait for a slot; returns its key.

        Raises
        ------
        InputError
            If its prompt does not fit a slot, an id is outside the vocabulary, no token is
            given or asked for, or its key is that of another request.
        """
        request.check(self.model.config)
        room = self.cache.capacity - len(request.prompt) + 1
        if room < 1:
            raise InputError(
                f"a prompt of {len(request.prompt)} tokens does not fit a slot of "
                f"{self.cache.capacity}",
                where="Engine.submit",
                remedy="Shorten the prompt, or make an Engine of a larger capacity.",
            )
        sequence = Sequence(request, request.params.limit(room))
        if self._by_key.setdefault(request.key, sequence) is not sequence:
            raise InputError(
                f"a request with the key {shown(request.key)} is running",
                where="Engine.submit",
                remedy="Give each request a key of its own.",
            )
        self._submitted.append(sequence)
        return request.key

    def cancel(self, key: Any) -> None:
        """End a request at the next step; one that is not there is left alone."""
        if (sequence := self._by_key.get(key)) is not None:
            self._cancelled.append(sequence)

    # -- loops over step() -------------------------------------------------------------------------

    def blocks(self, requests: Iterable[Request | None]) -> Generator[Block, None, None]:
        """Run requests to their ends; an iterator is read as slots become free.

        It may give None for "none at present", and is asked again after a step; where nothing
        runs, it should wait instead.

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
        free, begun = self._free, self._forks
        self._check_process(begun)
        if not free.acquire(blocking=False):
            raise BusyError(
                "this engine is running other requests",
                where="Engine.run",
                remedy="Finish or close() the first run, or make one more Engine of the model.",
            )
        try:
            source, more = iter(requests), True
            while True:
                while more and self.scheduler.waiting + len(self._submitted) < self.slots:
                    request = next(source, _END)
                    more = request is not _END
                    if request is None:
                        break
                    if request is not _END:
                        self.submit(request)
                if self.idle and not more:
                    return
                yield self.step()
                self._check_process(begun)
        except BaseException:  # closed early too; what other threads submit at the end stays
            if begun == self._forks:
                with self._on_device():
                    self._clear()
            raise
        finally:
            if begun == self._forks:
                free.release()

    def _check_process(self, begun: int) -> None:
        """Refuse to go on with a run of the parent's in a child, or with its GPU."""
        if begun != self._forks:
            raise ClosedError(
                "this run began before the process was forked",
                where="Engine.run",
                remedy="Start it again here.",
            )
        if self._forks and self.model.xp is not np:
            raise forks.no_gpu_here("Engine.run")

    def run(self, requests: Iterable[Request]) -> Iterator[Token]:
        """:meth:`blocks`, token by token."""
        begun = self._forks
        with contextlib.closing(self.blocks(requests)) as blocks:
            for block in blocks:
                for token in tokens_of(block):
                    yield token
                    self._check_process(begun)

    @property
    def idle(self) -> bool:
        """Whether nothing waits, runs or is still to be read."""
        return self.scheduler.idle and not (self._submitted or self._queued)

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> Block:
        """Queue the next step and return what earlier ones brought; maybe no tokens yet.

        An error, of whatever kind, ends all requests: half a step cannot be gone on with.
        """
        begun = self._forks
        with self._on_device():
            try:
                self._read_inbox()
                self._admit()
                self._run_prompts()
                # Without a lead what was chosen is read first: it need not wait for a step.
                stepped = self._queue_step() if self._lead or not self._queued else False
                return self._collect(self._lead if stepped else None)
            except BaseException:
                if begun == self._forks:
                    with contextlib.suppress(Exception):  # of a GPU that failed
                        self._clear()
                        self.rows.recover()
                raise

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

    def _read_inbox(self) -> None:
        while self._submitted:
            sequence = self._submitted.popleft()
            # Again, as the end of a run may have come between that and its being submitted.
            self._by_key.setdefault(sequence.request.key, sequence)
            self.scheduler.add(sequence)
        gone = []
        while self._cancelled:
            sequence = self._cancelled.popleft()
            if sequence.ended:
                continue
            sequence.ended = True
            del self._by_key[sequence.request.key]
            if sequence.number >= 0:
                self.results.alive[sequence.number] = False
            gone.append(sequence)
        self._end(gone)

    def _admit(self) -> None:
        for sequence in self.scheduler.admit():
            self.cache.reset(sequence.slot)
            sequence.number = self.results.open(sequence.request, sequence.limit)

    def _run_prompts(self) -> None:
        """Run a piece of waiting prompts; give rows to those that end, with their first tokens."""
        piece = self.scheduler.piece()
        if not piece.sequences:
            return
        # All but the last, which may be cut.
        done = [sequence for sequence in piece.sequences if not len(sequence.rest)]
        slots = [sequence.slot for sequence in piece.sequences]
        if done:
            self.scheduler.enter(done)
            self.rows.enter(done)
        # One sequence in an engine for one, to its end: the same graph samples its first token.
        alone = self.slots == 1 and bool(done)
        if not self._started:
            self._start(piece, len(done), alone)
        x = self.prompts.run(piece.tokens, slots, self.state if alone else None)
        if not done:
            return
        rows = slice(done[0].row, done[-1].row + 1)
        if not alone:
            self.rows.sample_first(x[: len(done)], rows.start)
        self._ask(rows)
        waits = [each for each in done if each.row >= 0 and len(each.request.held_back) > 1]
        self._held_back += waits

    def _start(self, piece: Piece, done: int, alone: bool) -> None:
        """Record all that the first tokens need, so that its kernels are compiled side by side."""
        state = self.state if alone else None
        self.prompts.record([len(tokens) for tokens in piece.tokens], state)
        self.rows.record(max(done, 1), first=not alone)
        self._started = True

    def _free_ends(self) -> None:
        """Let those ends be chosen that a bias has kept back long enough."""
        for sequence in list(self._held_back):
            params, number = sequence.request.params, sequence.number
            if sequence.row >= 0 and self.results.queued[number] < params.min_new_tokens:
                continue
            self._held_back.remove(sequence)
            if sequence.row >= 0:
                self.state.set_bias(sequence.row, params.logit_bias)

    def _queue_step(self) -> bool:
        """Queue a decode step of all rows, if there are any."""
        running = len(self.scheduler.rows)
        if not running:
            return False
        if self._held_back:
            self._free_ends()
        self.rows.step(running)
        self.cache.lengths[self.scheduler.lines[1]] += 1
        self._ask(slice(0, running))
        return True

    def _ask(self, rows: slice) -> None:
        """Note the tokens that rows were just asked for; who has asked for its last one leaves."""
        numbers = self.scheduler.lines[0][rows]
        top = int(self.results.tops[numbers].max())
        self._queued.append(self.rows.asked(rows, numbers, top))
        last = self.results.ask(numbers) + rows.start
        if len(last):
            running = self.scheduler.rows
            self._leave([running[row] for row in last.tolist()])

    def _leave(self, sequences: list[Sequence]) -> None:
        """Take rows and slots from sequences."""
        before = len(self.scheduler.rows)
        # From the last row on: of neighbours that leave together none has to move.
        for sequence in sorted(sequences, key=lambda each: -each.row):
            if sequence.slot >= 0:
                self.cache.reset(sequence.slot)
            if (move := self.scheduler.leave(sequence)) is not None:
                self.state.move(*move)
        if (after := len(self.scheduler.rows)) < before:
            self.state.release(after, before)

    # -- what comes back ---------------------------------------------------------------------------

    def _collect(self, lead: int | None) -> Block:
        """Read what is due: of steps that are ``lead`` old; the oldest one without a lead."""
        blocks: list[Block] = []
        while self._queued:
            due = not blocks if lead is None else self._queued[0].step + lead <= self.rows.steps
            if not due:
                break
            blocks.append(self._read(self._queued.popleft()))
        self._close_lines()
        return merged(blocks)

    def _read(self, queued: Queued) -> Block:
        ids, logprobs, top = self.rows.read(queued)
        self.discarded += len(ids) - int(self.results.alive[queued.numbers].sum())
        block = self.results.add(queued.numbers, ids, logprobs, top)
        self._end([self._by_key.pop(done.request.key) for done in block.finished])
        return block

    def _end(self, sequences: list[Sequence]) -> None:
        """Let go of sequences that need no more tokens."""
        for sequence in sequences:
            sequence.ended = True
            if sequence.number >= 0:
                self._closing.append((len(self._queued) and self._queued[-1].step, sequence))
        self._leave([sequence for sequence in sequences if sequence.slot >= 0])

    def _close_lines(self) -> None:
        """Close lines that no queued step names any more."""
        while self._closing and not (self._queued and self._queued[0].step <= self._closing[0][0]):
            self.results.close(self._closing.popleft()[1].number)

    def _clear(self) -> None:
        """Leave no request behind."""
        self._submitted.clear()
        self._cancelled.clear()
        self._queued.clear()
        self.scheduler.clear()
        self.cache.reset()
        self._by_key.clear()
        self._closing.clear()
        self._held_back.clear()
        self.results.clear()
        self.state.release(0, self.slots)


def _checked_lead(lead: object) -> int:
    """How many steps to queue: a row's token ring takes two tokens of each, and of the one read."""
    if isinstance(lead, bool) or not isinstance(lead, int) or not 0 <= lead < RING // 2 - 1:
        raise InputError(
            f"lead={shown(lead)} is impossible",
            where="Engine",
            remedy=f"It must be an integer from 0 to {RING // 2 - 2}.",
        )
    return lead
