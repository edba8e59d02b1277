"""Checked launches as objects: run at once, collected for a decoder, or captured with overlap."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from .driver import programmatic_start
from .tensor_map import Tiles, room


class _Thread(threading.local):
    """What belongs to one thread: the tape being recorded, and plans (plan.py) by their facts."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], Any]] | None = None
        self.known: dict[Any, Any] = {}  # of launches
        self.plans: Mapping[Any, Any] = {}  # of ops; NO_PLANS while none may be run or kept


THREAD = _Thread()
NO_PLANS: Mapping[Any, Any] = MappingProxyType({})


class Later:
    """A kernel that may still be compiled while launches of it are recorded.

    Parameters
    ----------
    load : callable
        Waits for the compiler and returns the loaded cupy.RawKernel.
    """

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load = load

    def __call__(self, *args: Any, **options: Any) -> None:
        self.load()(*args, **options)


class Launch:
    """A kernel with its grid and its checked, cast arguments.

    Parameters
    ----------
    function : cupy.RawKernel or Later
    grid, block : tuple of int
    values : tuple
        CuPy arrays, NumPy scalars and Tiles, as the kernel takes them; a Tiles is that of
        the array whose place ``tiles_of`` has.
    overlaps : bool
        Whether the kernel waits for its predecessor by itself, so that it may
        start before that one ends (``griddepcontrol_wait`` in common.cuh).
    shared : int
        Bytes of dynamic shared memory of a block.
    writes_weights : bool
        Whether no kernel may start before it ends: it writes what others load before they
        wait.
    cooperative : bool
        Whether all its blocks must run at once.
    pairs : tuple
        The arrays that may not overlap, as ``overlap.neighbours`` returns them.
    tiles_of : tuple of int
        For each Tiles among the values the place of its array among them.
    waits_first : bool
        Whether it reads and writes nothing before it waits, so that any kernel may precede it.
    """

    def __init__(
        self,
        function: Any,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        values: tuple[Any, ...],
        overlaps: bool = False,
        shared: int = 0,
        writes_weights: bool = False,
        cooperative: bool = False,
        pairs: Any = (),
        tiles_of: tuple[int, ...] = (),
        waits_first: bool = False,
    ) -> None:
        self.function = function
        self.grid = grid
        self.block = block
        self.values = values
        self.overlaps = overlaps
        self.shared = shared
        self.writes_weights = writes_weights
        self.cooperative = cooperative
        self.pairs = pairs
        self.tiles_of = tiles_of
        self.waits_first = waits_first

    def load(self) -> None:
        """Wait for the kernel if it is still being compiled, and load it."""
        if isinstance(self.function, Later):
            self.function = self.function.load()

    def __call__(self) -> None:
        if self.tiles_of:
            self.by_driver()
        else:
            self.function(self.grid, self.block, self.values, shared_mem=self.shared)

    def by_driver(self) -> None:
        """Launch it past CuPy, which passes no tensor maps."""
        import cupy

        self.load()
        memory: list[Any] = []
        addresses = []
        places = iter(self.tiles_of)
        for value in self.values:
            if isinstance(value, Tiles):
                cell, address = room()
                value.write(self.values[next(places)].data.ptr, address)
            else:
                cell = np.array([value.data.ptr if isinstance(value, cupy.ndarray) else value])
                address = cell.ctypes.data
            memory.append(cell)
            addresses.append(address)
        listed = np.array(addresses, np.uintp)
        sizes = *(*self.grid, 1, 1)[:3], *(*self.block, 1, 1)[:3]
        stream = cupy.cuda.get_current_stream().ptr
        cupy.cuda.driver.launchKernel(
            self.function.kernel.ptr, *sizes, self.shared, stream, listed.ctypes.data, 0
        )

    def overlapped(self) -> None:
        """Launch it so that it may start while its predecessor still runs."""
        import cupy

        cells = [
            np.array([value.data.ptr if isinstance(value, cupy.ndarray) else value])
            for value in self.values
        ]
        addresses = np.array([cell.ctypes.data for cell in cells], np.uintp)
        start = programmatic_start(self.function.kernel.ptr, self.grid, self.block, self.shared)
        start(cupy.cuda.get_current_stream().ptr, addresses.ctypes.data, 0)


def submit(call: Callable[[], Any]) -> None:
    """Run a checked launch, or put it on the tape while one is being recorded."""
    calls = THREAD.calls
    if calls is None:
        call()
    else:
        calls.append(call)


def recording() -> bool:
    """Whether launches of this thread are being recorded."""
    return THREAD.calls is not None


@contextlib.contextmanager
def recorded() -> Iterator[list[Callable[[], Any]]]:
    """Collect the launches made inside instead of running them.

    They hold their arrays, and are valid as long as those are what is meant:
    checks are made once, when recording, and not again when replaying. Their kernels are
    compiled side by side from now on; :func:`load` waits for them.
    """
    calls: list[Callable[[], Any]] = []
    THREAD.calls = calls
    try:
        with without_plans():
            yield calls
    finally:
        THREAD.calls = None


@contextlib.contextmanager
def without_plans() -> Iterator[None]:
    """Within, this thread's ops run as if they had never been called."""
    plans, THREAD.plans = THREAD.plans, NO_PLANS
    try:
        yield
    finally:
        THREAD.plans = plans


def load(calls: Iterable[Callable[[], Any]]) -> None:
    """Wait for the kernels of recorded launches, and load them."""
    for call in calls:
        if isinstance(call, Launch):
            call.load()
