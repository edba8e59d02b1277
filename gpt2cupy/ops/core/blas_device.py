"""cuBLAS on one GPU: NVIDIA's bindings, our handles, the memory they work in, and whose turn it is.

Streams of one GPU share the workspace: one waits for the other, whichever threads they come from;
a caller with memory of its own gives that (:func:`working_in`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np

from ...errors import DeviceError
from .device import current_device

WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper, ample elsewhere
# cudaDataType and cublasComputeType_t
TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
COMPUTE_32F = 68
OP_N, OP_T = 0, 1


def _bindings() -> Any:
    try:
        from nvmath.bindings import cublas, cublasLt
    except ImportError as error:
        raise DeviceError(
            "nvmath-python, NVIDIA's binding of cuBLAS, is not installed",
            where="nvmath.bindings",
            remedy="Install gpt2cupy[cuda12] or gpt2cupy[cuda13], whichever fits the driver.",
        ) from error
    return cublas, cublasLt


class Handles:
    """Handles and workspace of one GPU; lives as long as the process."""

    def __init__(self) -> None:
        import cupy

        self.cublas, self.lt = _bindings()
        self.handle = self.cublas.create()
        self.lt_handle = self.lt.create()
        self.workspace = cupy.empty(WORKSPACE, np.uint8)
        self.stream = -1  # setting a stream drops the workspace: both are set when it changes
        self.one, self.zero = np.ones(1, np.float32), np.zeros(1, np.float32)


@functools.cache
def handles(device: int) -> Handles:
    return Handles()


# cudaStreamPerThread: one number, and for each thread a stream of its own.
_PER_THREAD = 2


class _Turns:
    """Who may queue work on one GPU that uses the workspace, and the stream it was queued on last.

    A context manager; inside it, it may be entered again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._stream: Any = None  # the last one as (number, its thread if it is a thread's own)
        self._queued: Any = None  # what waits for the work queued on it

    def __enter__(self) -> None:
        import cupy

        self._lock.acquire()
        try:
            if self._depth == 0:
                current = cupy.cuda.get_current_stream()
                thread = threading.current_thread() if current.ptr == _PER_THREAD else None
                stream = current.ptr, thread
                queued, before = self._queued, self._stream
                self._queued, self._stream = current, stream
                # What is queued on one stream runs in order anyway.
                if queued is not None and before != stream:
                    queued.synchronize()
        except BaseException:
            self._lock.release()
            raise
        self._depth += 1

    def __exit__(self, *exception: object) -> None:
        try:
            if self._depth == 1 and self._stream[1]:
                # Another thread would wait for its own stream by that number, not for this one.
                import cupy

                done = cupy.cuda.Event(disable_timing=True)
                done.record(self._queued)
                self._queued = done
        finally:
            self._depth -= 1
            self._lock.release()


_turns: dict[int, _Turns] = {}


def workspace() -> _Turns:
    """The workspace of the current GPU for what is queued inside: GEMMs, or graphs of them.

    Other threads wait, and so does the host for what another stream has queued.
    """
    device = current_device()
    return _turns.get(device) or _turns.setdefault(device, _Turns())


def current_stream() -> int:
    import cupy

    return cupy.cuda.get_current_stream().ptr


# What the products that are asked for work in, None: the workspace.
MEMORY: ContextVar[Any] = ContextVar("MEMORY", default=None)


@contextlib.contextmanager
def working_in(memory: Any) -> Iterator[None]:
    """Within, cuBLASLt works in these WORKSPACE bytes and takes no turns at the GPU's own.

    Whoever gives them says when they are used again. None, or no bytes: as without.
    """
    token = MEMORY.set(memory if memory is not None and memory.size else None)
    try:
        yield
    finally:
        MEMORY.reset(token)
