"""Calls that were checked before: found again by the facts that their checks rest on.

A :class:`Plan` is the launches of one call with their arguments in memory. Another call of the
same dtypes, shapes, layouts, devices and scalars differs from it in its pointers alone, which are
written there before the kernels start. :func:`launch` keeps plans of single launches, and
:func:`.planned.planned` those of a whole op, which then costs one look-up in a dictionary.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .blas_product import Queued
from .device import has_programmatic_launch
from .driver import programmatic_start
from .overlap import meet
from .signature import granule
from .tape import Launch
from .tensor_map import Tiles, room

Array = Any
_KNOWN = 4096  # plans that a thread keeps
_CHECKED = 256  # sets of pointers that a plan remembers as checked


class Plan:
    """Checked launches, to be run again with other pointers, past CuPy's handling of arguments.

    CuPy makes an object of every argument of every call. Here all of them lie in memory
    once, eight bytes each, and only pointers are written before the launches, and the tensor maps
    that hold some. So a plan belongs to one thread.

    Parameters
    ----------
    calls : sequence of Launch or Queued
        Checked, and loaded.
    places : sequence of sequences of int
        For each array of each launch the place of its pointer among those of the call.
    count : int
        Pointers of the call.
    device : int
    """

    def __init__(
        self,
        calls: Sequence[Launch | Queued],
        places: Sequence[Sequence[int]],
        count: int,
        device: int,
    ) -> None:
        import cupy

        # The pointers, and the scalars of all launches.
        cells = array("Q", bytes(8 * (count + sum(len(call.values) for call in calls))))
        start, free = cells.buffer_info()[0], count
        self._memory: list[Any] = [cells]
        launches: list[tuple[Callable[[int, int, int], None], int]] = []
        granules: dict[int, int] = {}
        pairs = set()
        maps: list[tuple[Tiles, int, int]] = []  # with the place of the pointer, and the address
        for call, taken in zip(calls, places, strict=True):
            for place, value in zip(taken, call.values, strict=False):
                if isinstance(value, cupy.ndarray):
                    granules[place] = granule(value)
            for pair in call.pairs:
                if not _is_absent(call.values[pair.other]):
                    pairs.add(pair._replace(written=taken[pair.written], other=taken[pair.other]))
            if isinstance(call, Queued):
                launches.append((functools.partial(_start_queued, call, cells, taken), 0))
                continue
            used = [start + 8 * place for place in taken]
            of_tiles = iter(call.tiles_of)
            for value in call.values[len(taken) :]:
                if isinstance(value, Tiles):
                    memory, address = room()
                    self._memory.append(memory)
                    maps.append((value, taken[next(of_tiles)], address))
                    used.append(address)
                    continue
                # Little-endian, as every machine with CUDA: the value's bytes come first.
                cells[free] = int.from_bytes(value.tobytes(), "little")
                used.append(start + 8 * free)
                free += 1
            addresses = array("Q", used)
            self._memory += [addresses, call.function]  # keeps the module loaded
            launches.append((_start(call, device), addresses.buffer_info()[0]))
        self.device = device
        self.current_device = cupy.cuda.runtime.getDevice
        self.checked: set[tuple[int, ...]] = set()
        self._granules, self._pairs = tuple(granules.items()), tuple(pairs)
        self._write = functools.partial(struct.Struct(f"{count}Q").pack_into, cells, 0)
        self._stream = cupy.cuda.get_current_stream
        self._launches = launches
        self._maps = maps

    def admits(self, pointers: tuple[int, ...]) -> bool:
        """Whether arrays at these addresses are aligned, and overlap only where they may."""
        if pointers in self.checked:
            return True
        for place, step in self._granules:
            if pointers[place] % step:
                return False
        for pair in self._pairs:
            if meet(pair, pointers[pair.written] - pointers[pair.other]):
                return False
        if len(self.checked) >= _CHECKED:
            self.checked.clear()
        self.checked.add(pointers)
        return True

    def run(self, pointers: tuple[int, ...]) -> None:
        """Launch on the current stream with these pointers, 0 for None."""
        self._write(*pointers)
        for tiles, place, address in self._maps:
            tiles.write(pointers[place], address)
        stream = self._stream(self.device).ptr
        for start, addresses in self._launches:
            start(stream, addresses, 0)

    def run_on(self, stream: int, pointers: tuple[int, ...]) -> None:
        """Launch on the stream with this address."""
        self._write(*pointers)
        for tiles, place, address in self._maps:
            tiles.write(pointers[place], address)
        for start, addresses in self._launches:
            start(stream, addresses, 0)


def _start(call: Launch, device: int) -> Callable[[int, int, int], None]:
    """A function of stream and addresses that starts a launch."""
    import cupy

    kernel = call.function.kernel.ptr
    if call.waits_first and has_programmatic_launch(device):
        return programmatic_start(kernel, call.grid, call.block, call.shared)
    sizes = *(*call.grid, 1, 1)[:3], *(*call.block, 1, 1)[:3]
    return functools.partial(cupy.cuda.driver.launchKernel, kernel, *sizes, call.shared)


def _start_queued(
    call: Queued, cells: Sequence[int], taken: Sequence[int], stream: int, *rest: int
) -> None:
    call.start(stream, [cells[place] for place in taken])


def can_be_planned(call: Any) -> bool:
    """Whether a recorded call is a launch that can be run past CuPy; it is loaded then."""
    if isinstance(call, Queued):
        return True
    if not isinstance(call, Launch) or call.cooperative:
        return False
    call.load()
    return hasattr(call.function, "kernel")


def places_of(
    calls: Sequence[Launch | Queued], arrays: Sequence[Array | None]
) -> list[list[int]] | None:
    """For each array of each launch its place among the call's; None if one is not among them.

    What a launch leaves out (a null pointer) has the place behind the last. A view of all of an
    array stands for it.
    """
    known = {id(each): place for place, each in enumerate(arrays) if each is not None}

    def place_of(value: Any) -> int | None:
        if _is_absent(value):
            return len(arrays)
        place = known.get(id(value))
        whole = getattr(value, "base", None)
        if place is None and whole is not None:
            # Of arrays that lie at the same place it could be any.
            alike = [p for p, each in enumerate(arrays) if _same_memory(each, value, whole)]
            place = alike[0] if len(alike) == 1 else None
        return place

    places = []
    for call in calls:
        pointers = [value for value in call.values if _is_pointer(value)]
        # Arrays come first in every signature.
        assert all(map(_is_pointer, call.values[: len(pointers)])), call
        known_here = [place_of(value) for value in pointers]
        if None in known_here:
            return None
        places.append(known_here)
    return places  # type: ignore[return-value]


def _same_memory(array: Any, view: Any, whole: Any) -> bool:
    """Whether a view of ``whole`` is all of an array, under another shape."""
    related = array is not None and (array is whole or getattr(array, "base", None) is whole)
    return related and (array.data.ptr, array.nbytes) == (view.data.ptr, view.nbytes)


def _is_absent(value: Any) -> bool:
    """Whether it stands for an array that is left out."""
    return value is None or isinstance(value, np.uintp)


def _is_pointer(value: Any) -> bool:
    # Scalars of kernels are of other types of NumPy's.
    return isinstance(value, np.uintp) or not isinstance(value, (np.generic, Tiles))


def keep(plans: dict[Any, Any], key: Any, plan: Any) -> None:
    """Remember a plan; a thread that has too many forgets them all."""
    if len(plans) >= _KNOWN:
        plans.clear()
    plans[key] = plan
