"""Recorded launches as a CUDA graph: captured once, and then one launch for all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

from ..ops.core import blas
from ..ops.core.device import has_clusters
from ..ops.core.tape import Launch, load


def _may_overlap(before: Any, call: Launch) -> bool:
    """Whether a launch may start while the one before still runs; the first of a graph never."""
    if before is None or not call.overlaps:
        return False
    return not (isinstance(before, Launch) and before.writes_weights)


def captured(calls: list[Callable[[], Any]]) -> Callable[[], None]:
    """A graph of recorded launches, as a function that launches it on the current stream.

    On sm_90 and newer, neighbouring kernels that know how to wait for each other are captured
    with programmatic edges: while one runs, the next already loads its weights. The first kernel
    of a graph starts only when the one before is complete; that is what lets the others read
    positions and past keys before they wait.

    Whoever keeps it must keep ``calls`` too: they hold the arrays that the graph works on.
    """
    import cupy

    load(calls)  # nothing may be loaded while a stream is being captured
    overlap = has_clusters()  # programmatic edges came with the same chips
    stream = cupy.cuda.Stream(non_blocking=True)
    # Nobody may wait for a stream that is being captured.
    with blas.workspace(), stream:
        stream.begin_capture()
        try:
            for before, call in zip([None, *calls], calls, strict=False):
                if overlap and isinstance(call, Launch) and _may_overlap(before, call):
                    call.overlapped()
                else:
                    call()
        except BaseException:
            # Left open, the capture would make other calls of the driver fail. It is worth
            # nothing now, and may say so by an error of its own.
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):
                stream.end_capture()
            raise
        graph = stream.end_capture()

    # Kernels of ours alone need no turn at the library's workspace.
    ours = all(isinstance(call, Launch) for call in calls)

    def run() -> None:
        with contextlib.nullcontext() if ours else blas.workspace():
            graph.launch(cupy.cuda.get_current_stream())

    return run
