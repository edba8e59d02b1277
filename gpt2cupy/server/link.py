"""A front's end of the line to the engine process: streams that wait for what it sends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any, Protocol

import zmq

from . import messages
from .messages import Cancel, Failed, Hello, Ready, Scored, Tick

_FRAMES = 64  # read at once, before the streams that they concern write


class Stream(Protocol):
    """Who waits for one stream.

    Attributes
    ----------
    ids, logprobs : list
        Tokens that came and were not looked at yet.
    top : list or None
        The most probable tokens of each, where they are wanted.
    reason : str or None
        Why the last token is the last one.
    """

    ids: list[int]
    logprobs: list[float]
    top: list[list[tuple[int, float]]] | None
    reason: str | None

    def flush(self) -> None:
        """Look at the tokens that came; maybe called once more than needed."""

    def fail(self, status: int, message: str) -> None:
        """Take it that there will be no more."""

    def scored(self, logprobs: list[float], top: list[list[tuple[int, float]]]) -> None:
        """Take log-probabilities of the prompt."""


class EngineLink:
    """Sends requests to the engine process and hands out what comes back.

    Parameters
    ----------
    front : int
        Number of this front.
    on_ready : callable
        Called when an engine process takes requests.

    Attributes
    ----------
    about : dict or None
        What the engine said of itself; None while it takes no requests.
    """

    def __init__(self, front: int, on_ready: Callable[[], None]) -> None:
        self.front = front
        self._on_ready = on_ready
        self.about: dict[str, Any] | None = None
        self._context: Any = zmq.Context.instance(io_threads=1)
        self._socket: Any = None
        self._streams: dict[int, Stream] = {}
        self._next = 0
        self._loop = asyncio.get_running_loop()

    def connect(self, address: str) -> None:
        """Talk to the engine process that is, or will be, at ``address``."""
        self.lost()
        socket = self._socket = self._context.socket(zmq.DEALER)
        socket.set(zmq.SNDHWM, 0)
        socket.set(zmq.RCVHWM, 0)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.RECONNECT_IVL, 10)
        socket.set(zmq.IDENTITY, f"{self.front}-{os.getpid()}".encode())
        socket.connect(address)
        self._loop.add_reader(socket.get(zmq.FD), self._read)
        self.send([Hello(self.front)])

    def lost(self) -> None:
        """The engine process is gone: whoever waits is told."""
        self.about = None
        if self._socket is not None:
            self._loop.remove_reader(self._socket.get(zmq.FD))
            self._socket.close()
            self._socket = None
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream.fail(503, "the engine process ended; it is being started again")

    def open(self, stream: Stream) -> int:
        """A number under which a stream gets what the engine sends."""
        self._next += 1
        self._streams[self._next] = stream
        return self._next

    def close(self, numbers: list[int]) -> None:
        """Stop the streams that are still open."""
        open_ = [n for n in numbers if self._streams.pop(n, None) is not None]
        if open_ and self._socket is not None:
            self.send([Cancel(open_)])

    @property
    def streams(self) -> int:
        """How many are open."""
        return len(self._streams)

    def send(self, posted: list[Any]) -> None:
        """Send messages, in one frame."""
        self._socket.send(messages.encode(posted), zmq.NOBLOCK)
        # Sending may swallow the edge that says there is something to read.
        self._loop.call_soon(self._read)

    def _read(self) -> None:
        socket = self._socket
        touched: list[Stream] = []
        if socket is None:
            return
        for _ in range(_FRAMES):
            if not socket.get(zmq.EVENTS) & zmq.POLLIN:
                break
            frame = socket.recv(zmq.NOBLOCK)
            for message in messages.decode_to_front(frame):
                if type(message) is Tick:
                    self._take(message, touched)
                else:
                    self._other(message)
        else:
            self._loop.call_soon(self._read)
        for stream in touched:
            stream.flush()

    def _take(self, tick: Tick, touched: list[Stream]) -> None:
        numbers = messages.ints(tick.streams, "q")
        find = self._streams.get
        tokens = zip(numbers, messages.ints(tick.ids), messages.floats(tick.logprobs), strict=True)
        for number, id_, logprob in tokens:
            stream = find(number)
            if stream is not None:
                if not stream.ids:
                    touched.append(stream)
                stream.ids.append(id_)
                stream.logprobs.append(logprob)
        if tick.top is not None:
            for number, best in zip(numbers, pairs(tick.top), strict=True):
                stream = find(number)
                if stream is not None and stream.top is not None:
                    stream.top.append(best)
        for number, reason in tick.finished:
            stream = self._streams.pop(number, None)
            if stream is not None:
                stream.reason = reason
                touched.append(stream)

    def _other(self, message: Any) -> None:
        if isinstance(message, Ready):
            self.about = message.about
            self._on_ready()
            return
        stream = self._streams.pop(message.stream, None)
        if stream is None:
            return
        if isinstance(message, Failed):
            stream.fail(message.status, message.message)
        elif isinstance(message, Scored):
            stream.scored(messages.floats(message.logprobs), pairs(message.top))


def pairs(top: tuple[int, bytes, bytes]) -> list[list[tuple[int, float]]]:
    """The most probable tokens of each place with their log-probabilities, best first."""
    width, packed_ids, packed_values = top
    if not width:
        return []
    ids, values = messages.ints(packed_ids), messages.floats(packed_values)
    found = []
    for start in range(0, len(ids), width):
        best = zip(ids[start : start + width], values[start : start + width], strict=True)
        found.append([pair for pair in best if pair[0] >= 0])
    return found
