"""Running the same generation again and again: unprofiled, op by op, and what the chip can do.

On the GPU an op is timed by events around each of its launches, on NumPy by the
host's clock.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..decode import decoder, sample_first
from ..errors import InputError
from ..generation.engine import Engine
from ..model import GPT2
from ..ops.core import registry
from ..sampling import SamplingParams
from . import events
from .components import Op, observed, ops_of_step
from .timeline import Timeline

QUEUE = 512  # launches that a stream surely takes without making the host wait


@dataclass(frozen=True)
class Settings:
    """What is run: ``warmup`` and ``runs`` generations of ``tokens`` tokens after the prompt.

    ``decode`` is the path that runs the unprofiled steps, and those whose kernels
    are recorded; ops are timed one by one, those of a graph launched eagerly.
    """

    prompt: str = "What is your name"
    warmup: int = 20
    runs: int = 20
    tokens: int = 30
    batch: int = 1
    decode: str = "eager"

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("runs", 1), ("tokens", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"--{name} is {getattr(self, name)}",
                    where="profile",
                    remedy=f"It must be at least {least}.",
                )


class Session:
    """An engine that repeats one generation, greedily and without an end token.

    Parameters
    ----------
    model : GPT2
    prompt : array of int32 [T]
        Fed to every row of the batch.
    settings : Settings

    Raises
    ------
    InputError
        If prompt and tokens exceed the context.
    """

    def __init__(self, model: GPT2, prompt: np.ndarray, settings: Settings) -> None:
        self.model, self.prompt, self.settings = model, prompt, settings
        room = model.config.n_positions
        if len(prompt) + settings.tokens > room:
            raise InputError(
                f"{len(prompt)} prompt tokens and {settings.tokens} new ones exceed the context of "
                f"{room}",
                where="--prompt",
                remedy="Shorten the prompt or lower --tokens.",
            )
        self.engine = Engine(model, settings.batch, decode=settings.decode)
        self.state, self.decoder = self.engine.state, self.engine.decoder
        self.on_gpu = model.xp is not np
        with self.active():
            self.begin()
            context = len(prompt) + (settings.tokens - 1) / 2
            self.ops: list[Op] = ops_of_step(self.decoder, self.state, context)

    def renew_decoder(self) -> None:
        """Start with a decoder that has prepared nothing: a graph is captured again."""
        self.decoder = decoder(self.model, self.decoder.name)
        self.decoder.step(self.state)
        self.synchronize()

    def new_event(self) -> Any:
        return self.model.xp.cuda.Event()

    @contextlib.contextmanager
    def active(self) -> Any:
        """The engine's device and stream."""
        with self.engine.device, self.engine.stream:
            yield

    def begin(self) -> None:
        """Run the prompt of every row and sample the first token."""
        cache, state = self.engine.cache, self.state
        row_params = SamplingParams(temperature=0).row(0, len(self.prompt), -1)
        for row in range(self.settings.batch):
            cache.reset(row)
            state.assign(row, row, row_params)
            state.seek(row, len(self.prompt) - 1)
            room = self.engine.prefill_work.rows
            for begin in range(0, len(self.prompt), room):
                piece = self.prompt[begin : begin + room]
                x, _ = self.model.prefill([piece], [row], cache, self.engine.prefill_work)
            sample_first(self.model, state, x[len(piece) - 1 :], row)

    def synchronize(self) -> None:
        if self.on_gpu:
            self.engine.stream.synchronize()

    def unprofiled(self) -> tuple[np.ndarray, float]:
        """One run as it always goes: the prompt, then :meth:`steps`."""
        self.begin()
        self.synchronize()
        return self.steps()

    def steps(self) -> tuple[np.ndarray, float]:
        """The steps of a run: seconds of each [tokens], and of the host to queue one.

        They are queued without waiting; on the GPU an event stands after each.
        """
        tokens = self.settings.tokens
        if not self.on_gpu:
            times = [time.perf_counter()]
            for _ in range(tokens):
                self.decoder.step(self.state)
                times.append(time.perf_counter())
            seconds = np.diff(times)
            return seconds, float(seconds.mean())
        marks, queueing = [self.new_event() for _ in range(tokens + 1)], []
        marks[0].record(self.engine.stream)
        for event in marks[1:]:
            start = time.perf_counter()
            self.decoder.step(self.state)
            queueing.append(time.perf_counter() - start)
            event.record(self.engine.stream)
        marks[-1].synchronize()
        # Once the queue is full the host waits for the device: only the first steps count.
        free = max(1, QUEUE // sum(len(op.launches) for op in self.ops))
        host = float(np.mean(queueing[:free]))
        return np.asarray(events.elapsed(self.model.xp, marks)) / 1e3, host

    def by_op(self) -> Timeline:
        """One run with every op timed."""
        self.begin()
        self.synchronize()
        return self._by_events() if self.on_gpu else self._by_clock()

    def _by_clock(self) -> Timeline:
        times: list[tuple[float, float]] = []
        clock = time.perf_counter

        def around(op: registry.Op, args: tuple, options: dict[str, Any]) -> Any:
            start = clock()
            result = op(*args, **options)
            times.append((start, clock()))
            return result

        tokens = self.settings.tokens
        with observed(around):
            marks = [clock()]
            for _ in range(tokens):
                self.decoder.step(self.state)
                marks.append(clock())
        step_us = float(np.median(np.diff(marks))) * 1e6
        both = np.asarray(times).reshape(tokens, -1, 2) * 1e6
        names = [f"numpy {op.name}" for op in self.ops]
        owner = [(index, 0) for index in range(len(self.ops))]
        return Timeline(both[..., 0], both[..., 1], owner, names, "perf_counter", step_us)

    def _by_events(self) -> Timeline:
        stream, tokens = self.engine.stream, self.settings.tokens
        launches = [launch for op in self.ops for launch in op.launches]
        owner = [(i, part) for i, op in enumerate(self.ops) for part in range(len(op.launches))]
        labels = [self.ops[index].label for index, _ in owner]
        ranges = events.nvtx_ranges()
        empty = self._empty_us()
        marks = [self.new_event() for _ in range(len(launches) + 1)]
        starts, ends, now = [], [], 0.0
        begin = time.perf_counter()
        for _ in range(tokens):
            with events.gate(stream):
                marks[0].record(stream)
                for launch, label, event in zip(launches, labels, marks[1:], strict=True):
                    with ranges(label):
                        launch()
                    event.record(stream)
            marks[-1].synchronize()
            spans = np.maximum(np.asarray(events.elapsed(self.model.xp, marks)) * 1e3 - empty, 0)
            edges = now + np.concatenate([[0], np.cumsum(spans)])
            starts.append(edges[:-1])
            ends.append(edges[1:])
            now = edges[-1]
        wall = (time.perf_counter() - begin) / tokens
        names = [events.launch_name(launch) for launch in launches]
        return Timeline(np.array(starts), np.array(ends), owner, names, "events", wall * 1e6)

    def _empty_us(self) -> float:
        """What two events after one another cost, in microseconds."""
        marks = [self.new_event() for _ in range(101)]
        with events.gate(self.engine.stream):
            for event in marks:
                event.record(self.engine.stream)
        marks[-1].synchronize()
        return float(np.median(events.elapsed(self.model.xp, marks))) * 1e3
