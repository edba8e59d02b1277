"""A model and its engine: used by one call at a time, freed when it is closed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np

from ..errors import ClosedError
from ..model import GPT2
from ..ops.core.device import device_errors
from . import forks
from .engine import Engine
from .lock import SessionLock
from .request import Request
from .results import Block

T = TypeVar("T")
_END: Any = object()  # of an iterator


class Session:
    """What a :class:`LanguageModel` holds on a device.

    Parameters
    ----------
    model : GPT2
    name : str
        For errors.
    prefix_cache : bool
        Whether its engines keep beginnings of prompts from call to call.

    Attributes
    ----------
    gpu : int or None
        Number of the GPU, None on the CPU.
    """

    def __init__(self, model: GPT2, name: str, *, prefix_cache: bool = False) -> None:
        self._prefix_cache = prefix_cache
        self.gpu: int | None = None if model.xp is np else model.weights.wte.device.id
        self._name = name
        self._model: GPT2 | None = model
        # One for single requests, which need not pay for idle rows, and one for many.
        self._engines: dict[bool, Engine] = {}
        self._engine: Engine | None = None  # the one used last
        self._running: Any = None  # the engine's generator while a call reads it
        # Held while the generator runs: a thread that closes must not meet it there.
        self._stepping = threading.RLock()
        self._lock = SessionLock(name)
        self._forks = 0  # since it was made: what began before is the parent's
        self._parents: list[Any] = []  # what a child must not free, as CUDA is not there
        forks.watch(self)

    def after_fork(self) -> None:
        """In a child: calls of the parent's threads are not there, nor is CUDA."""
        self._forks += 1
        self._stepping = threading.RLock()
        if self.gpu is not None:
            self._parents += [self._running, self._engine, self._engines, self._model]
        self._running, self._engine, self._engines = None, None, {}
        self._lock.after_fork()

    @property
    def lost(self) -> bool:
        """Whether this process is a child of the one that has the GPU."""
        return self.gpu is not None and self._forks > 0

    @property
    def closed(self) -> bool:
        return self._model is None

    @property
    def model(self) -> GPT2:
        if self.lost:
            raise forks.no_gpu_here(self._name)
        if self._model is None:
            raise ClosedError("this model is closed", where=self._name, remedy="Load it again.")
        return self._model

    def check_open(self) -> None:
        """Raise if it is closed; unlike ``model`` it hands no reference to a frame that stays."""
        _ = self.model

    def check_not_mine(self) -> None:
        """Raise BusyError if the calling thread has a stream open, for which another would wait."""
        self._lock.check_not_mine()

    @contextlib.contextmanager
    def turn(self) -> Iterator[GPT2]:
        """The model for this call alone, its device the current one."""
        self.check_open()
        with self._lock.take(), self._on_gpu():
            yield self.model

    def items(self, make: Callable[[GPT2], Iterator[T]]) -> Generator[T, None, None]:
        """What ``make(model)`` yields; holds the turn until it ends.

        Between two items the current device is the caller's.
        """
        self.check_open()
        with self._lock.take():
            with self._on_gpu():
                found = make(self.model)
            try:
                while True:
                    self.check_open()
                    with self._on_gpu():
                        item = next(found, _END)
                    if item is _END:
                        return
                    yield item
                    self._lock.carry()
            finally:
                del found  # and the model with it, which a traceback would keep

    def blocks(
        self, requests: Iterable[Request | None], slots: int
    ) -> Generator[Block, None, None]:
        """What the engine makes of the requests; holds the turn until they are done.

        Parameters
        ----------
        requests : iterable of Request or None
            As :meth:`Engine.blocks` takes them.
        slots : int
            Sequences generated at once.
        """
        self.check_open()
        begun = self._forks
        with self._lock.take():
            self.check_open()
            # Not held by this frame, so that close() frees it while a stream is open.
            with self._on_gpu():
                self._running = self._engine_for(slots).blocks(requests)
            try:
                while (block := self._next(begun)) is not None:
                    yield block
                    if begun == self._forks:
                        self._lock.carry()
            except GeneratorExit:
                raise
            except BaseException:
                if begun != self._forks:
                    raise
                # A step that ended half-way leaves the engine in disorder.
                self._forget_engines()
                raise
            finally:
                if begun == self._forks:
                    with self._stepping:
                        self._running.close()
                    self._running = None
                    if self.closed:
                        self._forget_engines()  # close() may have come while one was made
                        self._free_pools()

    def _next(self, begun: int) -> Block | None:
        if begun != self._forks and not self.lost:
            raise ClosedError(
                "this stream was opened before the process was forked",
                where=self._name,
                remedy="Open another one here.",
            )
        self.check_open()
        # Entered for each block: between two of a stream, device and GPU are the caller's.
        with self._on_gpu(), self._stepping:
            self.check_open()
            block = next(self._running, None)
        self.check_open()
        return block

    def most_slots(self) -> int:
        """Sequences that may well be generated at once: 16 on the CPU; as many as fit a GPU.

        At most 256, a power of two, in half of the memory that is free.
        """
        if self.gpu is None:
            return 16
        model = self.model
        config = model.config
        per_slot = 2 * config.n_layer * config.n_positions * config.n_embd * model.dtype.itemsize
        with self._on_gpu():
            free = model.xp.cuda.runtime.memGetInfo()[0]
            free += model.xp.get_default_memory_pool().free_bytes()
        fitting = max(int(free // 2 // per_slot), 1)
        return min(1 << (fitting.bit_length() - 1), 256)

    def cancel(self, key: Any) -> None:
        """End a running request from outside, for instance at a stop string."""
        engine = self._engine  # close() of another thread may take it away
        if engine is not None:
            engine.cancel(key)

    def close(self) -> None:
        """Free everything; what is running ends with ClosedError at its next token."""
        self._model = None
        if self.lost:
            return
        self._lock.end()
        self._forget_engines()
        # Where another thread is executing a step, it notices afterwards.
        if self._stepping.acquire(blocking=False):
            try:
                if (running := self._running) is not None:
                    with contextlib.suppress(ValueError):  # a signal's handler, in mid-step
                        running.close()
            finally:
                self._stepping.release()
        self._free_pools()

    def _engine_for(self, slots: int) -> Engine:
        """The engine for one or for many.

        Made again when more slots are asked for than it has, or when the model multiplies
        otherwise than when its decoder was chosen.
        """
        many = slots > 1
        engine = self._engines.get(many)
        if engine is None or engine.slots < slots or engine.backend != self.model.backend:
            engine = self._engine = None  # freed before the new one takes memory
            self._forget(many)
            engine = self._engines[many] = Engine(
                self.model, slots, prefix_cache=self._prefix_cache
            )
        self._engine = engine
        return engine

    def _forget(self, many: bool) -> None:
        engine = self._engines.pop(many, None)
        if engine is not None and self.gpu is not None:
            # A queued step may still write to its memory; a GPU that failed cannot be waited for.
            with contextlib.suppress(Exception):
                engine.stream.synchronize()

    def _forget_engines(self) -> None:
        self._engine = None
        for many in (False, True):
            self._forget(many)

    def _free_pools(self) -> None:
        """Give back what CuPy keeps for later allocations."""
        if self.gpu is not None:
            import cupy

            with cupy.cuda.Device(self.gpu), device_errors(self._name):
                cupy.get_default_memory_pool().free_all_blocks()
                cupy.get_default_pinned_memory_pool().free_all_blocks()

    @contextlib.contextmanager
    def _on_gpu(self) -> Iterator[None]:
        """The GPU as current device; its errors are ours."""
        if self.gpu is None:
            yield
            return
        import cupy

        with cupy.cuda.Device(self.gpu), device_errors(self._name):
            yield
