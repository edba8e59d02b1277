"""Counters of all processes in files that each maps: one adds, whoever is scraped sums them.

A process that dies leaves its file, and the one that takes its place counts on in it, so nothing
that was counted is lost. Names, types and buckets are vLLM's where the meaning is the same.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0,
         7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0)  # fmt: skip
FIRST_TOKEN = tuple(b for b in _FAST if b != 0.0025)
BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75,
           1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)  # fmt: skip
REQUEST = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
           120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)  # fmt: skip
ITERATION = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0,
             16384.0)  # fmt: skip
REASONS = ("stop", "length", "abort", "error")
OUTCOMES = ("completed", "error", "client_gone")


@dataclass(frozen=True)
class Series:
    """One metric.

    Attributes
    ----------
    name, help : str
    kind : {"counter", "gauge", "histogram"}
    label : str
        Of the values; "" where there is one.
    values : tuple
        Label values, or upper bounds of buckets.
    """

    name: str
    kind: str
    help: str
    label: str = ""
    values: tuple[str, ...] | tuple[float, ...] = ()

    @property
    def size(self) -> int:
        """Numbers that it is made of: a histogram has a last bucket, and its sum."""
        return len(self.values) + 2 if self.kind == "histogram" else max(len(self.values), 1)


def _histogram(name: str, help: str, bounds: tuple[float, ...]) -> Series:
    return Series(name, "histogram", help, "le", bounds)


ALL = (
    Series("vllm:num_requests_running", "gauge", "Requests that have a slot."),
    Series("vllm:num_requests_waiting", "gauge", "Requests that wait for a slot."),
    Series("vllm:kv_cache_usage_perc", "gauge", "Share of the cache in use; 1 is all of it."),
    Series("vllm:prefix_cache_queries", "counter", "Prompt tokens looked for in kept prefixes."),
    Series("vllm:prefix_cache_hits", "counter", "Prompt tokens found in kept prefixes."),
    Series("vllm:prompt_tokens", "counter", "Tokens of prompts that were run."),
    Series("vllm:generation_tokens", "counter", "Tokens generated."),
    Series("vllm:request_success", "counter", "Requests that ended, by reason.",
           "finished_reason", REASONS),
    _histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", FIRST_TOKEN),
    _histogram("vllm:inter_token_latency_seconds", "Between tokens of a request.", BETWEEN),
    _histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", REQUEST),
    _histogram("vllm:request_queue_time_seconds", "From arrival to a slot.", REQUEST),
    _histogram("vllm:request_prefill_time_seconds", "From a slot to the first token.", REQUEST),
    _histogram("vllm:request_decode_time_seconds", "From the first to the last token.", REQUEST),
    _histogram("vllm:iteration_tokens_total", "Tokens of a step: of prompts that ended in it, and "
               "generated.", ITERATION),
    Series("vllm:spec_decode_num_drafts", "counter", "Drafts that were checked."),
    Series("vllm:spec_decode_num_draft_tokens", "counter", "Tokens of drafts that were checked."),
    Series("vllm:spec_decode_num_accepted_tokens", "counter", "Tokens of drafts that were taken."),
    Series("gpt2cupy:requests_accepted", "counter", "Requests that were taken to be answered."),
    Series("gpt2cupy:requests_answered", "counter", "Requests that were answered, or whose client "
           "went away.", "outcome", OUTCOMES),
    Series("gpt2cupy:requests_refused", "counter", "Requests answered with an error before they "
           "were accepted."),
    Series("gpt2cupy:events_sent", "counter", "Server-sent events with text."),
    Series("gpt2cupy:discarded_tokens", "counter", "Tokens computed past the end of their text."),
    Series("gpt2cupy:slow_readers_closed", "counter", "Connections closed as nobody read them."),
    Series("gpt2cupy:engine_up", "gauge", "1 while the engine process takes requests."),
    Series("gpt2cupy:engine_restarts", "counter", "Engine processes started in place of a dead "
           "one."),
    Series("gpt2cupy:front_restarts", "counter", "Front processes started in place of a dead one."),
)  # fmt: skip
SERIES = {series.name: series for series in ALL}
_PLACE: dict[str, int] = {}
for _series in ALL:
    _PLACE[_series.name] = sum(s.size for s in ALL[: len(_PLACE)])
SIZE = sum(series.size for series in ALL)


class Store:
    """The numbers of one process.

    Parameters
    ----------
    folder : path
    process : str
        Who counts here.
    """

    def __init__(self, folder: str | Path, process: str) -> None:
        path = Path(folder) / f"{process}.counters"
        if not path.exists():
            path.write_bytes(bytes(8 * SIZE))
        with path.open("r+b") as file:
            self._map = mmap.mmap(file.fileno(), 8 * SIZE)
        self.numbers = np.frombuffer(self._map, np.float64)
        self._bounds = {s.name: np.array(s.values) for s in ALL if s.kind == "histogram"}

    def add(self, name: str, amount: float = 1.0, value: str = "") -> None:
        """Count; ``value`` is that of the label."""
        self.numbers[_place(name, value)] += amount

    def set(self, name: str, amount: float) -> None:
        """Set a gauge."""
        self.numbers[_PLACE[name]] = amount

    def observe(self, name: str, values: np.ndarray) -> None:
        """Put values into a histogram."""
        bounds, place = self._bounds[name], _PLACE[name]
        buckets = np.searchsorted(bounds, values)
        counts = np.bincount(buckets, minlength=len(bounds) + 1)
        self.numbers[place : place + len(counts)] += counts
        self.numbers[place + len(counts)] += values.sum()


def _place(name: str, value: str) -> int:
    return _PLACE[name] + (SERIES[name].values.index(value) if value else 0)


def total(folder: str | Path) -> np.ndarray:
    """The numbers of all processes, added up."""
    found = np.zeros(SIZE)
    for path in Path(folder).glob("*.counters"):
        found += np.frombuffer(path.read_bytes(), np.float64, SIZE)
    return found


def value_of(numbers: np.ndarray, name: str, value: str = "") -> float:
    """One counter or gauge."""
    return float(numbers[_place(name, value)])


def exposition(numbers: np.ndarray, model: str) -> str:
    """What Prometheus scrapes, in its text format."""
    name = model.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return "".join(f"{line}\n" for s in ALL for line in _lines(s, numbers, f'model_name="{name}"'))


def _lines(series: Series, numbers: np.ndarray, label: str) -> Iterable[str]:
    place = _PLACE[series.name]
    own = numbers[place : place + series.size].tolist()
    name = series.name
    # A counter's samples end in _total; its family does so too in the text format.
    if series.kind == "counter":
        name += "_total"
    yield f"# HELP {name} {series.help}"
    yield f"# TYPE {name} {series.kind}"
    if series.kind == "histogram":
        *counts, last, of_all = own
        so_far = 0.0
        for bound, count in zip(series.values, counts, strict=True):
            so_far += count
            yield f'{name}_bucket{{{label},le="{bound}"}} {so_far}'
        yield f'{name}_bucket{{{label},le="+Inf"}} {so_far + last}'
        yield f"{name}_count{{{label}}} {so_far + last}"
        yield f"{name}_sum{{{label}}} {of_all}"
    elif series.label:
        for value, amount in zip(series.values, own, strict=True):
            yield f'{name}{{{label},{series.label}="{value}"}} {amount}'
    else:
        yield f"{name}{{{label}}} {own[0]}"
