"""A model and its engine: used by one call at a time, freed when it is closed."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np

from .engine import Engine, Request, Token
from .errors import ClosedError
from .model import GPT2
from .ops.device import device_errors
from .turns import Turns


class HeldModel:
    """What a :class:`LanguageModel` holds on a device.

    Parameters
    ----------
    model : GPT2
    name : str
        For errors.

    Attributes
    ----------
    gpu : int or None
        Number of the GPU, None on the CPU.
    """

    def __init__(self, model: GPT2, name: str) -> None:
        self.gpu: int | None = None if model.xp is np else model.weights.wte.device.id
        self._name = name
        self._model: GPT2 | None = model
        self._engine: Engine | None = None
        self._running: Any = None  # the engine's generator while a call reads it
        self._turns = Turns(name)

    @property
    def closed(self) -> bool:
        return self._model is None

    @property
    def model(self) -> GPT2:
        if self._model is None:
            raise ClosedError("this model is closed", where=self._name, remedy="Load it again.")
        return self._model

    def check_open(self) -> None:
        """Raise if it is closed; unlike ``model`` it hands no reference to a frame that stays."""
        _ = self.model

    @contextlib.contextmanager
    def turn(self) -> Iterator[GPT2]:
        """The model for this call alone, its device the current one."""
        with self._turns.take(), self._on_gpu():
            yield self.model

    def tokens(self, requests: list[Request], slots: int) -> Generator[Token, None, None]:
        """What the engine makes of the requests; holds the turn until they are done."""
        with self._turns.take():
            self.check_open()
            wanting = [r for r in requests if r.params.max_new_tokens != 0]
            if not wanting:
                return
            # Not held by this frame, so that close() frees it while a stream is open.
            with self._on_gpu():
                self._running = self._engine_for(min(slots, len(wanting))).run(wanting)
            try:
                while (token := self._next()) is not None:
                    yield token
                    self._turns.carry()
                    self.check_open()
                self.check_open()
            except GeneratorExit:
                raise
            except BaseException:
                # A step that ended half-way leaves the engine in disorder.
                self._forget_engine()
                raise
            finally:
                self._running.close()
                self._running = None
                if self.closed:
                    self._free_pools()

    def _next(self) -> Token | None:
        # Entered for each token: between two of a stream, device and GPU are the caller's.
        with self._on_gpu():
            return next(self._running, None)

    def drop(self, key: Any) -> None:
        """End a running request from outside, for instance at a stop string."""
        if self._engine is not None:
            self._engine.drop(key)

    def close(self) -> None:
        """Free everything; what is running ends with ClosedError at its next token."""
        self._model = None
        self._forget_engine()
        running = self._running
        if running is not None:
            # ValueError: another thread is executing it, and notices after its step.
            with contextlib.suppress(ValueError):
                running.close()
        self._free_pools()

    def _engine_for(self, slots: int) -> Engine:
        """The engine, made anew when more slots are asked for than it has."""
        if self._engine is None or self._engine.slots < slots:
            self._forget_engine()
            self._engine = Engine(self.model, slots)
        return self._engine

    def _forget_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None and self.gpu is not None:
            # A queued step may still write to its memory; a GPU that failed cannot be waited for.
            with contextlib.suppress(Exception):
                engine.stream.synchronize()

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
