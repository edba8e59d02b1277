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

from ..decode import Decoder, DecodeState
from ..errors import BusyError, ClosedError, InputError, not_a_flag, shown
from ..model import GPT2
from ..ops.core.device import device_errors, memory_error
from . import forks
from .request import Request, Token
from .results import Block, tokens_of
from .rows import Rows
from .running import Running
from .scheduler import Sequence

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
    prefix_cache : bool
        Whether prompts may take the beginnings of requests that have ended, until their slots
        are needed. Without it they share only with those of the same run: what a slot holds is
        forgotten when :meth:`blocks` begins, and when nothing is left to run.

    Attributes
    ----------
    running : Running
        What runs.
    prefixes : Prefixes
        What the slots hold. Its ``queries`` and ``hits`` count the tokens of all prompts, and
        those of them that were taken from a slot.
    """

    def __init__(
        self,
        model: GPT2,
        slots: int = 1,
        capacity: int | None = None,
        *,
        decode: str | None = None,
        lead: int | None = None,
        prefix_cache: bool = False,
    ) -> None:
        self.model = model
        self.prefix_cache = _checked_flag("prefix_cache", prefix_cache)
        self._free = threading.Lock()  # until a run has ended
        self._forks = 0  # since it was made: a run that began before is the parent's
        forks.watch(self)
        self.device: Any = contextlib.nullcontext()
        self.stream: Any = contextlib.nullcontext()
        self._lead = (0 if model.xp is np else LEAD) if lead is None else _checked_lead(lead)
        if model.xp is np:
            try:
                self._allocate(slots, capacity, decode)
            except MemoryError as error:
                raise memory_error(error, f"a cache of {slots} slots", "this machine") from error
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
        running = self.running = Running(
            self.model, slots, capacity, path or self.model.decode_path
        )
        self.cache, self.prompts, self.prefill_work = (
            running.cache,
            running.prompts,
            running.prefill_work,
        )
        self.scheduler, self.results, self.prefixes = (
            running.scheduler,
            running.results,
            running.prefixes,
        )
        self.backend = self.model.backend  # which the decoder was chosen for
        self._submitted: deque[Sequence] = deque()
        self._cancelled: deque[Sequence] = deque()
        self._by_key: dict[Any, Sequence] = {}
        self._ready: deque[Block] = deque()  # what was read and not yet returned

    @property
    def slots(self) -> int:
        return self.cache.slots

    @property
    def rows(self) -> Rows:
        """What runs the steps of texts that do not speculate."""
        return self.running.plain

    @property
    def state(self) -> DecodeState:
        """Of all rows."""
        return self.rows.state

    @property
    def discarded(self) -> int:
        """Tokens that were computed past the end of their text."""
        return self.running.discarded

    @property
    def drafted(self) -> int:
        """Draft tokens that were verified since the engine was made, of all texts."""
        return self.running.drafted

    @property
    def accepted(self) -> int:
        """Those of them that were accepted."""
        return self.running.accepted

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
            self.running.recover()  # it may have come in the middle of a step

    # -- what may be called from any thread --------------------------------------------------------

    def submit(self, request: Request) -> Any:
        """Let a request wait for a slot; returns its key.

        Raises
        ------
        InputError
            If its prompt and the new tokens that it asks for do not fit a slot, an id is outside
            the vocabulary, no token is given or asked for, its key is that of another request, or
            it speculates in an engine of several slots.
        """
        request.check(self.model.config)
        sequence = Sequence(request, request.limit_in(self.cache.capacity, self.slots))
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
            if not self.prefix_cache:
                self.prefixes.forget()
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
        return self.running.idle and not (self._submitted or self._ready)

    # -- one step ----------------------------------------------------------------------------------

    def step(self) -> Block:
        """Queue the next step and return what earlier ones brought; maybe no tokens yet.

        An error, of whatever kind, ends all requests: half a step cannot be gone on with.
        """
        begun = self._forks
        with self._on_device():
            try:
                self._read_inbox()
                if not self._ready:
                    self._go_on()
                block = self._ready.popleft()
                over = [self._by_key.pop(done.request.key) for done in block.finished]
                self.running.finish(over, block)
                # A run forgets when it begins: between two of its steps nothing may be left too.
                if not (self.prefix_cache or self._free.locked()) and self.idle:
                    self.prefixes.forget()
                return block
            except BaseException:
                if begun == self._forks:
                    with contextlib.suppress(Exception):  # of a GPU that failed
                        self._clear()
                        self.running.recover()
                raise

    def _go_on(self) -> None:
        """Queue the next step and read an earlier one."""
        running = self.running
        running.admit()
        running.run_prompts()
        # Without a lead what was chosen is read first: it need not wait for a step.
        lead = running.lead(self._lead)
        stepped = running.queue_step() if lead or not running.unread else False
        self._ready += running.collect(lead if stepped else None)

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
        gone: list[Sequence] = []
        while self._cancelled:
            sequence = self._cancelled.popleft()
            if sequence.ended:
                continue
            sequence.ended = True
            del self._by_key[sequence.request.key]
            gone.append(sequence)
        if gone:
            # Where several blocks are ready, they are of one text.
            keys = {sequence.request.key for sequence in gone}
            self._ready = deque(each for each in self._ready if not keys.issuperset(each.keys))
            self.running.cancel(gone)

    def _clear(self) -> None:
        """Leave no request behind."""
        self._submitted.clear()
        self._cancelled.clear()
        self._by_key.clear()
        self._ready.clear()
        self.running.clear()


def _checked_lead(lead: object) -> int:
    """How many steps to queue."""
    if isinstance(lead, bool) or not isinstance(lead, int) or not 0 <= lead <= Rows.most_lead:
        raise InputError(
            f"lead={shown(lead)} is impossible",
            where="Engine",
            remedy=f"It must be an integer from 0 to {Rows.most_lead}.",
        )
    return lead


def _checked_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise not_a_flag(name, value, where="Engine")
    return bool(value)
