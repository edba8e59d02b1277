"""The engine process's loop: one owner of one engine, an inbox, and one message a step to a front.

Requests and cancellations are read between steps. What a step brought goes out as arrays; with
``coalesce`` it is kept back for so long, and more of it goes out at once.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import zmq

from ..errors import DeviceError, DeviceMemoryError, Gpt2CupyError
from ..generation.request import Request
from ..generation.results import Block, merged
from ..generation.scoring import Scorer, non_finite
from ..generation.windows import Window
from ..sampling import SamplingParams
from . import messages
from .messages import Cancel, Failed, Hello, Ready, Score, Scored, Submit, Tick
from .metrics import Store
from .stations import Stations

_SETTLE_SECONDS = 0.1
_SCORED_AT_ONCE = 64
_IDLE_SECONDS = 0.2  # how long an idle loop waits for a message before it looks around again


class Worker:
    """Serves fronts from one engine.

    Parameters
    ----------
    engine : Engine
        Or what has its ``submit``, ``cancel``, ``step`` and ``idle``.
    socket : zmq.Socket
        A bound ROUTER.
    store : Store
    about : dict
        What :class:`Ready` tells the fronts.
    coalesce : float
        Seconds that tokens may be kept back.
    clock : callable
        Seconds that never go backward.
    """

    def __init__(
        self,
        engine: Any,
        socket: Any,
        store: Store,
        about: dict[str, Any],
        *,
        coalesce: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.engine = engine
        self.socket = socket
        self.store = store
        self.about = about
        self.coalesce = coalesce
        self.clock = clock
        self.stations = Stations(store)
        self._fronts: dict[int, bytes] = {}  # identity of each front's socket
        self._outbox: dict[int, list[Any]] = {}  # for each front, beside ticks
        self._blocks: list[Block] = []  # that have not gone out
        self._sent = self._settled = clock()
        self._scores: deque[tuple[int, Score]] = deque()
        self._scorer: Scorer | None = None  # made when the first prompt is to be scored
        self.closed = False

    def run(self) -> None:
        """Until :attr:`closed`."""
        while not self.closed:
            self.turn()

    def turn(self) -> None:
        """Read messages, make a step, send what it brought."""
        busy = not self.engine.idle or bool(self._scores)
        self._read_inbox(wait=not busy and not self._blocks)
        if self._scores:
            self._score()
        if not self.engine.idle:
            self._step()
        self._send()
        if not self._blocks:
            now = self.clock()
            # Gauges of an engine that has come to rest, or of one that has long steps.
            due = busy and (self.engine.idle or now - self._settled > _SETTLE_SECONDS)
            self.stations.settle(self.engine, now=due)
            if due:
                self._settled = now

    # -- what comes in -----------------------------------------------------------------------------

    def _read_inbox(self, *, wait: bool) -> None:
        if wait:
            self.socket.poll(int(_IDLE_SECONDS * 1000))
        while self.socket.get(zmq.EVENTS) & zmq.POLLIN:
            identity, frame = self.socket.recv_multipart(zmq.NOBLOCK)
            for message in messages.decode_to_engine(frame):
                self._take(identity, message)

    def _take(self, identity: bytes, message: Any) -> None:
        if isinstance(message, Hello):
            self._welcome(identity, message.front)
            return
        front = next((f for f, known in self._fronts.items() if known == identity), None)
        if front is None:
            return  # of a front whose place was taken
        if isinstance(message, Submit):
            self._submit(front, message)
        elif isinstance(message, Cancel):
            for stream in message.streams:
                self._cancel(self.stations.line_of(front, stream))
        else:
            self._scores.append((front, message))

    def _welcome(self, identity: bytes, front: int) -> None:
        """Answer a front; the streams of the one before it have no reader."""
        if self._fronts.get(front, identity) != identity:
            for line in self.stations.lines_of(front):
                self._cancel(line)
            self._scores = deque(each for each in self._scores if each[0] != front)
        self._fronts[front] = identity
        self._post(front, Ready(self.about))

    def _submit(self, front: int, message: Submit) -> None:
        prompt = np.frombuffer(message.prompt, np.int32)
        line = self.stations.open(front, message.stream, message.arrived, len(prompt))
        try:
            params = SamplingParams.unchecked(message.params)
            eos = tuple(message.eos)
            self.engine.submit(Request(line, prompt, params, message.index, eos))
        except Gpt2CupyError as error:
            self._fail(line, 400, str(error))

    def _cancel(self, line: int | None) -> None:
        if line is not None:
            self.engine.cancel(line)
            self.stations.close(line, "abort")

    def _fail(self, line: int, status: int, words: str) -> None:
        front, stream = self.stations.reader(line)
        self._post(front, Failed(stream, status, words))
        self.stations.close(line, "error")

    # -- what is done ------------------------------------------------------------------------------

    def _step(self) -> None:
        begun = self.clock()
        try:
            block = self.engine.step()
        except Exception as error:
            # The engine has ended all its requests: each reader is told.
            for line in self.stations.open_lines():
                self._fail(line, 500, f"the engine failed: {error}")
            self._blocks.clear()
            self._send()
            if isinstance(error, DeviceError) or not isinstance(error, Gpt2CupyError):
                raise
            return
        self.stations.note(block, begun, self.clock(), self.engine.scheduler)
        if block.keys:
            self._blocks.append(block)

    def _score(self) -> None:
        """Score prompts that wait and want as many tokens at each place as the first, in a pass."""
        top = self._scores[0][1].top
        several: list[tuple[int, int, np.ndarray]] = []
        while self._scores and self._scores[0][1].top == top and len(several) < _SCORED_AT_ONCE:
            front, message = self._scores.popleft()
            several.append((front, message.stream, np.frombuffer(message.tokens, np.int32)))
        windows = [Window(tokens, 1) for _, _, tokens in several if len(tokens) > 1]
        try:
            with self.engine.device, self.engine.stream:
                if self._scorer is None:
                    self._scorer = Scorer(self.engine.model)
                found = iter(list(self._scorer.run(windows, top)))
        except Gpt2CupyError as error:
            for front, stream, _ in several:
                self._post(front, Failed(stream, 500, str(error)))
            if isinstance(error, DeviceError) and not isinstance(error, DeviceMemoryError):
                self._send()
                raise
            return
        for front, stream, tokens in several:
            if len(tokens) < 2:
                self._post(front, Scored(stream, b"", (0, b"", b"")))
                continue
            each = next(found)
            if np.isnan(each.logprobs).any():
                words = str(non_finite(self.engine.model, "score"))
                self._post(front, Failed(stream, 500, words))
                continue
            best: tuple[int, bytes, bytes] = 0, b"", b""
            if each.top is not None:
                ids, values = each.top
                best = ids.shape[1], ids.astype(np.int32).tobytes(), _float32(values)
            self._post(front, Scored(stream, _float32(each.logprobs), best))

    # -- what goes out -----------------------------------------------------------------------------

    def _post(self, front: int, message: Any) -> None:
        self._outbox.setdefault(front, []).append(message)

    def _send(self) -> None:
        now = self.clock()
        if self._blocks and (self.engine.idle or now - self._sent >= self.coalesce):
            self._sent = now
            self._make_ticks(merged(self._blocks))
            self._blocks.clear()
        if self._outbox:
            for front, posted in self._outbox.items():
                if front in self._fronts:
                    frame = messages.encode(posted)
                    self.socket.send_multipart((self._fronts[front], frame), copy=True)
            self._outbox.clear()

    def _make_ticks(self, block: Block) -> None:
        """Deal a block out to the fronts that wait for its tokens."""
        stations = self.stations
        lines = np.array(block.keys, np.int64)
        streams, fronts = stations.streams[lines], stations.fronts[lines]
        ended: dict[int, list[tuple[int, str]]] = {}
        for done in block.finished:
            front, stream = stations.reader(done.request.key)
            ended.setdefault(front, []).append((stream, done.finish_reason))
        of = set(fronts.tolist())
        for front in of:
            if front < 0:
                continue  # of lines that were closed
            mine = slice(None) if len(of) == 1 else fronts == front
            top = None
            if block.top is not None:
                ids, values = block.top[0][mine], block.top[1][mine]
                top = ids.shape[1], ids.tobytes(), values.tobytes()
            tick = Tick(
                streams[mine].tobytes(),
                block.ids[mine].tobytes(),
                block.logprobs[mine].tobytes(),
                ended.get(front, []),
                top,
            )
            self._post(front, tick)
        for done in block.finished:
            stations.close(done.request.key)


def _float32(values: np.ndarray) -> bytes:
    return np.asarray(values, np.float32).tobytes()
