"""Timing on the GPU by events.

The host opens a gate only when a whole step is queued, so that events see the
device's time and not Python's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

GATE_SECONDS = 0.5  # a gate opens by itself after this, should the queue be full before


def elapsed(cupy: Any, events: list[Any]) -> list[float]:
    """Milliseconds between each event and the next."""
    return [cupy.cuda.get_elapsed_time(a, b) for a, b in pairwise(events)]


@contextlib.contextmanager
def gate(stream: Any) -> Any:
    """Hold the stream until the block has queued all its work."""
    opened = threading.Event()
    stream.launch_host_func(lambda _: opened.wait(GATE_SECONDS) and None, None)
    try:
        yield
    finally:
        opened.set()


def nvtx_ranges() -> Callable[[str], Any]:
    """NVTX ranges by name, where the package is installed; a profiler of NVIDIA's shows them."""
    try:
        import nvtx
    except ImportError:
        return lambda _: contextlib.nullcontext()
    return lambda name: nvtx.annotate(name, domain="gpt2cupy")


def launch_name(launch: Any) -> str:
    """The kernel's entry, or the library that will choose one."""
    return str(getattr(getattr(launch, "function", None), "name", "cuBLAS"))
