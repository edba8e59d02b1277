"""Running the same generation again and again: unprofiled, op by op, and what the chip can do.

On the GPU an op is timed by events around each of its launches. The host opens a
gate only when the whole step is queued, so that the events see the device's time
and not Python's; what two events cost with nothing between them is taken off.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .. import ops
from ..decode.eager import choose
from ..engine import Engine
from ..errors import InputError
from ..model import GPT2
from ..sampling import SamplingParams
from ..timing import Timing, device_times, host_times
from .components import Op, observed, ops_of_step

GATE_SECONDS = 0.5  # a gate opens by itself after this, should the queue be full before


@dataclass(frozen=True)
class Settings:
    """What is run: ``warmup`` and ``runs`` generations of ``tokens`` tokens after the prompt."""

    prompt: str = "What is your name"
    warmup: int = 20
    runs: int = 20
    tokens: int = 30
    batch: int = 1

    def __post_init__(self) -> None:
        for name, least in (("warmup", 0), ("runs", 1), ("tokens", 2), ("batch", 1)):
            if getattr(self, name) < least:
                raise InputError(
                    f"--{name} is {getattr(self, name)}", remedy=f"It must be at least {least}."
                )


@dataclass
class Timeline:
    """When each launch (on NumPy: each op) of each step began and ended, in microseconds.

    Attributes
    ----------
    start, end : array of float64 [S, n]
        S steps of n launches, on one clock within a run.
    owner : list of (int, int)
        The op that each belongs to, and the launch of that op.
    names : list of str
    source : {"perf_counter", "events", "cupti"}
    step_us : float
        Median wall-clock time of a step while it was measured so.
    timer_us : float
        What timing one op costs outside its begin and end; taken off the gaps.
    """

    start: np.ndarray
    end: np.ndarray
    owner: list[tuple[int, int]]
    names: list[str]
    source: str
    step_us: float
    timer_us: float = 0.0

    @property
    def busy(self) -> np.ndarray:
        """Duration of each launch [S, n]."""
        return self.end - self.start

    def gap_us(self, tokens: int) -> float:
        """Median time of a step in which nothing ran, from its first launch to the next step's.

        Parameters
        ----------
        tokens : int
            Steps of a run: the pause between two runs is none of a step's.
        """
        gaps = (self.start[:, 1:] - self.end[:, :-1]).sum(axis=1)[:-1]
        gaps += self.start[1:, 0] - self.end[:-1, -1]
        within_run = np.arange(1, len(self.start)) % tokens > 0
        return float(np.median(gaps[within_run])) - len(self.names) * self.timer_us


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
        context = model.config.n_positions
        if len(prompt) + settings.tokens > context:
            raise InputError(
                f"{len(prompt)} prompt tokens and {settings.tokens} new ones exceed the context of "
                f"{context}",
                where="--prompt",
                remedy="Shorten the prompt or lower --tokens.",
            )
        self.engine = Engine(model, settings.batch)
        self.state, self.decoder = self.engine.state, self.engine.decoder
        self.on_gpu = model.xp is not np
        with self.active():
            self.begin()
            self.ops: list[Op] = ops_of_step(
                model, self.state, self.decoder, len(prompt) + (settings.tokens - 1) / 2
            )

    def new_event(self) -> Any:
        return self.model.xp.cuda.Event()

    @contextlib.contextmanager
    def active(self) -> Any:
        """The engine's device and stream."""
        with self.engine.device, self.engine.stream:
            yield

    def begin(self) -> None:
        """Run the prompt of every row and choose the first token."""
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
            logits = state.logits[row : row + 1]
            self.model.logits(x[len(piece) - 1 :], state.work.first(1), logits)
            choose(state, logits, state.rows[row : row + 1])

    def synchronize(self) -> None:
        if self.on_gpu:
            self.engine.stream.synchronize()

    def unprofiled(self) -> tuple[np.ndarray, float]:
        """One run as it always goes: seconds of each step [tokens], and of the host to queue one.

        The steps of a run are queued without waiting; on the GPU an event stands
        after each.
        """
        tokens = self.settings.tokens
        self.begin()
        self.synchronize()
        if not self.on_gpu:
            times = [time.perf_counter()]
            for _ in range(tokens):
                self.decoder.step(self.state)
                times.append(time.perf_counter())
            seconds = np.diff(times)
            return seconds, float(seconds.mean())
        events = [self.new_event() for _ in range(tokens + 1)]
        start = time.perf_counter()
        events[0].record(self.engine.stream)
        for event in events[1:]:
            self.decoder.step(self.state)
            event.record(self.engine.stream)
        host = (time.perf_counter() - start) / tokens
        events[-1].synchronize()
        return np.asarray(_elapsed(self.model.xp, events)) / 1e3, host

    def by_op(self) -> Timeline:
        """One run with every op timed."""
        self.begin()
        self.synchronize()
        return self._by_events() if self.on_gpu else self._by_clock()

    def _by_clock(self) -> Timeline:
        times: list[tuple[float, float]] = []
        clock = time.perf_counter

        def around(name: str, function: Any, args: tuple, options: dict[str, Any]) -> Any:
            start = clock()
            result = function(*args, **options)
            times.append((start, clock()))
            return result

        tokens = self.settings.tokens
        with observed(around) as stand_in:
            timer = _call_us(lambda: stand_in.call("", int)) - _call_us(int)
            times.clear()
            begin = clock()
            for _ in range(tokens):
                self.decoder.step(self.state)
            wall = (clock() - begin) / tokens
        both = np.asarray(times).reshape(tokens, -1, 2) * 1e6
        names = [f"numpy {op.name}" for op in self.ops]
        owner = [(index, 0) for index in range(len(self.ops))]
        return Timeline(both[..., 0], both[..., 1], owner, names, "perf_counter", wall * 1e6, timer)

    def _by_events(self) -> Timeline:
        stream, tokens = self.engine.stream, self.settings.tokens
        launches = [launch for op in self.ops for launch in op.launches]
        owner = [(i, part) for i, op in enumerate(self.ops) for part in range(len(op.launches))]
        labels = [self.ops[index].label for index, _ in owner]
        ranges = _ranges()
        empty = self._empty_us()
        events = [self.new_event() for _ in range(len(launches) + 1)]
        starts, ends, now = [], [], 0.0
        begin = time.perf_counter()
        for _ in range(tokens):
            with _gate(stream):
                events[0].record(stream)
                for launch, label, event in zip(launches, labels, events[1:], strict=True):
                    with ranges(label):
                        launch()
                    event.record(stream)
            events[-1].synchronize()
            spans = np.maximum(np.asarray(_elapsed(self.model.xp, events)) * 1e3 - empty, 0)
            edges = now + np.concatenate([[0], np.cumsum(spans)])
            starts.append(edges[:-1])
            ends.append(edges[1:])
            now = edges[-1]
        wall = (time.perf_counter() - begin) / tokens
        names = [launch_name(launch) for launch in launches]
        return Timeline(np.array(starts), np.array(ends), owner, names, "events", wall * 1e6)

    def _empty_us(self) -> float:
        """What two events after one another cost, in microseconds."""
        events = [self.new_event() for _ in range(101)]
        with _gate(self.engine.stream):
            for event in events:
                event.record(self.engine.stream)
        events[-1].synchronize()
        return float(np.median(_elapsed(self.model.xp, events))) * 1e3


def _call_us(call: Callable[[], Any]) -> float:
    return host_times(call, warmup=10, runs=100).median_us


def _elapsed(cupy: Any, events: list[Any]) -> list[float]:
    """Milliseconds between each event and the next."""
    return [cupy.cuda.get_elapsed_time(a, b) for a, b in pairwise(events)]


@contextlib.contextmanager
def _gate(stream: Any) -> Any:
    """Hold the stream until the block has queued all its work."""
    opened = threading.Event()
    stream.launch_host_func(lambda _: opened.wait(GATE_SECONDS) and None, None)
    try:
        yield
    finally:
        opened.set()


def _ranges() -> Callable[[str], Any]:
    """NVTX ranges by name, where the package is installed; a profiler of NVIDIA's shows them."""
    try:
        import nvtx
    except ImportError:
        return lambda _: contextlib.nullcontext()
    return lambda name: nvtx.annotate(name, domain="gpt2cupy")


def launch_name(launch: Any) -> str:
    """The kernel's entry, or the library that will choose one."""
    return str(getattr(getattr(launch, "func", launch), "name", "cuBLAS"))


@dataclass(frozen=True)
class Limits:
    """What this device reaches: bytes/s of a copy (read and written) and FLOP/s of a product."""

    copy_bytes_per_s: float
    product_flops_per_s: float
    copy_bytes: int
    product_size: int


def limits(model: GPT2) -> Limits:
    """Measure a large copy and a large product of the model's dtype on its device."""
    size, copy = _copy(model.xp)
    n = 1024 if model.xp is np else 4096
    # Zeros would be multiplied faster than a model's weights.
    values = np.random.default_rng(0).standard_normal((n, n), np.float32).astype(model.dtype)
    x, out = model.xp.asarray(values), model.xp.empty((n, n), model.dtype)
    if model.xp is np:
        product = host_times(lambda: np.matmul(x, x.T, out=out), warmup=2, runs=9)
    else:
        product = device_times(lambda: ops.linear(x, x, out=out), runs=9)
    rates = 2 * size / copy.median_us * 1e6, 2 * n**3 / product.median_us * 1e6
    return Limits(*rates, size, n)


def _copy(xp: Any) -> tuple[int, Timing]:
    """Bytes of a copy on the device, and its time."""
    if xp is np:
        size = 64 << 20
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        return size, host_times(lambda: np.copyto(target, source), warmup=2, runs=9)
    free, _ = xp.cuda.runtime.memGetInfo()
    size = min(1 << 30, free // 8) & ~255
    source, target = xp.zeros(size, np.uint8), xp.zeros(size, np.uint8)
    stream = xp.cuda.get_current_stream().ptr
    device_to_device = 3

    def copy() -> None:
        xp.cuda.runtime.memcpyAsync(
            target.data.ptr, source.data.ptr, size, device_to_device, stream
        )

    return size, device_times(copy, runs=9)
