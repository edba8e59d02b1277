"""Calls of asyncio: one thread owns the engine while any of them runs, and all share its steps."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from ..tokenizer import Tokenizer
from . import forks, scoring
from .collect import Collector
from .continuations import Growing
from .request import Request
from .results import Block, tokens_of
from .session import Session
from .text import Completion


class _Call:
    """What one call waits for; used by the owner's thread after it was submitted.

    Parameters
    ----------
    requests : list of Request
        Those that ask for tokens.
    loop : asyncio.AbstractEventLoop
    """

    def __init__(self, requests: list[Request], loop: asyncio.AbstractEventLoop) -> None:
        self.requests = requests
        self.loop = loop
        self.open = {request.key for request in requests}
        self.gone = False  # whether nobody waits any more
        self._ready: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def tell(self, function: Callable[..., Any], *args: Any) -> None:
        """Have a function called in the loop's thread, with others at once."""
        self._ready.append((function, args))

    def deliver(self) -> None:
        """Let the loop know of what came."""
        if not self._ready:
            return
        ready, self._ready = self._ready, []

        def call() -> None:
            for function, args in ready:
                function(*args)

        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits
            self.loop.call_soon_threadsafe(call)

    def end(self, error: BaseException | None) -> None:
        """Say that no more comes."""
        raise NotImplementedError


class _Whole(_Call):
    """A call that waits for all its completions."""

    def __init__(self, requests: list[Request], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(requests, loop)
        self.made: dict[Any, Completion] = {}
        self.done: asyncio.Future[None] = loop.create_future()

    def end(self, error: BaseException | None) -> None:
        def set_result() -> None:
            if self.done.done():  # cancelled meanwhile
                return
            if error is None:
                self.done.set_result(None)
            else:
                self.done.set_exception(error)

        self.tell(set_result)


class _Stream(_Call):
    """A call that waits for pieces."""

    def __init__(self, requests: list[Request], loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(requests, loop)
        self.growing: dict[Any, Growing] = {}
        self.pieces: asyncio.Queue[Any] = asyncio.Queue()
        self.failed: dict[tuple[int, int], str] = {}

    def end(self, error: BaseException | None) -> None:
        self.tell(self.pieces.put_nowait, error)


class Owner:
    """Runs requests of many tasks in one engine, from a thread that is there while any runs.

    Parameters
    ----------
    session : Session
    tokenizer : Tokenizer
    """

    def __init__(self, session: Session, tokenizer: Tokenizer) -> None:
        self._session = session
        self._tokenizer = tokenizer
        self._numbers = itertools.count()
        self._begin()
        forks.watch(self)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._inbox: deque[tuple[_Call, int]] = deque()
        self._left: deque[_Call] = deque()  # calls that nobody waits for any more
        self._thread: threading.Thread | None = None
        self._calls: dict[Any, _Call] = {}  # by the keys of what runs

    def after_fork(self) -> None:
        """In a child: the thread is the parent's, and so is what it runs."""
        self._begin()

    # -- in the threads of event loops -------------------------------------------------------------

    async def completions(self, groups: list[list[Request]], slots: int) -> list[list[Completion]]:
        """The completions of each prompt, in the order of the prompts.

        Parameters
        ----------
        groups : list of list of Request
            With keys (number of the prompt, number of the continuation).
        slots : int
            Sequences generated at once, if nothing runs yet; else those of what runs.
        """
        asked = [request for group in groups for request in group]
        call = _Whole(self._numbered(asked), asyncio.get_running_loop())
        nothing = Collector(self._tokenizer)
        for request in asked:
            if request.params.max_new_tokens == 0:
                nothing.add(request)
        made = {request.key: completion for request, completion in nothing.take()}
        if call.requests:
            self._submit(call, slots)
            try:
                await call.done
            except asyncio.CancelledError:
                self._leave(call)
                raise
        made |= {key[1]: completion for key, completion in call.made.items()}
        return [[made[request.key] for request in group] for group in groups]

    async def pieces(
        self, groups: list[list[Request]], slots: int
    ) -> AsyncIterator[tuple[int, Any]]:
        """A piece per token, each with the number of its prompt; as :meth:`completions`.

        Raises
        ------
        NonFiniteError
            If logits are not finite, when the other texts are done.
        """
        start = time.perf_counter()
        requests = self._numbered([request for (request,) in groups])
        call = _Stream(requests, asyncio.get_running_loop())
        for request in requests:
            call.growing[request.key] = Growing(self._tokenizer, request, start)
        if not requests:
            return
        self._submit(call, slots)
        try:
            while isinstance(item := await call.pieces.get(), tuple):
                yield item
        finally:
            self._leave(call)
        if item is not None:
            raise item
        if call.failed:
            (number, _), where = next(iter(call.failed.items()))
            where = f"prompt {number}, {where}" if len(groups) > 1 else where
            raise scoring.non_finite(self._session.model, where, failed=tuple(call.failed))

    def _numbered(self, asked: list[Request]) -> list[Request]:
        """Those that want tokens, with keys that no other call has: (number of the call, key)."""
        number = next(self._numbers)
        return [
            Request((number, r.key), r.prompt, r.params, r.index, r.eos, r.priority)
            for r in asked
            if r.params.max_new_tokens != 0
        ]

    def _submit(self, call: _Call, slots: int) -> None:
        self._session.check_open()
        self._session.check_not_mine()
        with self._lock:
            self._inbox.append((call, slots))
            if self._thread is None:
                name = "gpt2cupy-engine"
                self._thread = threading.Thread(target=self._run, name=name, daemon=True)
                self._thread.start()

    def _leave(self, call: _Call) -> None:
        """Nobody waits for a call any more."""
        call.gone = True
        if call.open:
            self._left.append(call)

    # -- in the thread that owns the engine --------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._inbox:
                    self._thread = None
                    return
                slots = self._inbox[0][1]
            try:
                self._run_engine(slots)
            except BaseException as error:
                self._fail(error)

    def _run_engine(self, slots: int) -> None:
        collector = Collector(self._tokenizer)
        with contextlib.closing(self._session.blocks(self._requests(collector), slots)) as blocks:
            for block in blocks:
                self._take(block, collector)

    def _requests(self, collector: Collector) -> Iterator[Request | None]:
        """What came in; None while there is nothing new; ends where nothing runs."""
        while True:
            self._drop(collector)
            with self._lock:
                call = self._inbox.popleft()[0] if self._inbox else None
            if call is not None:
                for request in [] if call.gone else call.requests:
                    self._calls[request.key] = call
                    if isinstance(call, _Whole):
                        collector.add(request)
                    yield request
            elif self._calls:
                yield None
            else:
                return

    def _drop(self, collector: Collector) -> None:
        """End the requests of calls that nobody waits for."""
        while self._left:
            call = self._left.popleft()
            for key in call.open & self._calls.keys():
                self._session.cancel(key)
                collector.forget(key)
                del self._calls[key]

    def _take(self, block: Block, collector: Collector) -> None:
        """Give what came to those who wait for it."""
        touched: dict[int, _Call] = {}
        for key in collector.push(block):
            self._session.cancel(key)
        for request, completion in collector.take():
            whole = self._calls[request.key]
            assert isinstance(whole, _Whole)
            whole.made[request.key] = completion
            self._ended(whole, request.key)
            touched[id(whole)] = whole
        if any(isinstance(call, _Stream) for call in self._calls.values()):
            for token in tokens_of(block):
                call = self._calls.get(token.key)
                if isinstance(call, _Stream):
                    self._push(call, token)
                    touched[id(call)] = call
        for each in touched.values():
            each.deliver()

    def _push(self, call: _Stream, token: Any) -> None:
        text, key = call.growing[token.key], token.key[1]
        piece = text.push(token)
        if piece.finish_reason == "error":
            call.failed[key] = f"new token {text.count}"
        else:
            call.tell(call.pieces.put_nowait, (key[0], piece))
        if piece.finish_reason:
            if not token.finish_reason:
                self._session.cancel(token.key)
            self._ended(call, token.key)

    def _ended(self, call: _Call, key: Any) -> None:
        del self._calls[key]
        call.open.discard(key)
        if not call.open:
            call.end(None)

    def _fail(self, error: BaseException) -> None:
        """The engine ended with an error: so does what ran, and what waited for it to begin."""
        calls = {id(call): call for call in self._calls.values()}
        self._calls.clear()
        with self._lock:
            calls |= {id(call): call for call, _ in self._inbox}
            self._inbox.clear()
        for call in calls.values():
            call.open.clear()
            call.end(error)
            call.deliver()
