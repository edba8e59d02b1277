"""Which arrays of a launch may not share memory, found once by layouts and then by pointers."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from ...errors import InputError
from .signature import Parameter, rows


def span(array: Any) -> int:
    """Bytes from an array's first element to behind its last."""
    if array._c_contiguous:
        return math.prod(array.shape) * array.itemsize
    last = sum((size - 1) * stride for size, stride in zip(array.shape, array.strides, strict=True))
    return last + array.itemsize


class Neighbours(NamedTuple):
    """Two arrays of a launch, by their places among its arrays, of which one is written."""

    written: int
    other: int
    low: int  # at distances from here to `high` between their starts their spans meet
    high: int
    in_place: bool  # a distance of 0 is allowed
    rows: tuple[int, int, int]  # their common row stride in bytes, or 0, and their rows' lengths


def neighbours(parameters: tuple[Parameter, ...], args: tuple[Any, ...]) -> tuple[Neighbours, ...]:
    """Each written array with each other one."""
    taken = [p for p in parameters if p.dims is not None or p.cast is not None]
    arrays = [(p, a) for p, a in zip(taken, args, strict=True) if p.dims is not None]
    found = []
    for i, (parameter, array) in enumerate(arrays):
        if not parameter.written or array is None:
            continue
        for j, (theirs, other) in enumerate(arrays):
            if i == j or other is None or (theirs.written and j > i):
                continue
            alike = array.dtype == other.dtype and _layout(array) == _layout(other)
            same = theirs.leads or theirs.dims == parameter.dims
            in_place = parameter.in_place and same and not theirs.written and alike
            (stride, row), (their_stride, their_row) = (
                _rows_of(parameter, array),
                _rows_of(theirs, other),
            )
            rows = (stride if stride == their_stride else 0, row, their_row)
            found.append(Neighbours(i, j, -span(array), span(other), in_place, rows))
    return tuple(found)


def _rows_of(parameter: Parameter, array: Any) -> tuple[int, int]:
    """Row stride and row length in bytes; no stride where nothing lies between rows."""
    if not parameter.leads or array._c_contiguous:
        return 0, 0
    assert parameter.dims is not None
    *sizes, stride = rows(array, len(parameter.dims) - 1) or (0,)
    return stride * array.itemsize, math.prod(sizes[1:]) * array.itemsize


def meet(pair: Neighbours, distance: int) -> bool:
    """Whether the two share memory at this distance, and may not."""
    if not pair.low < distance < pair.high or (pair.in_place and not distance):
        return False
    stride, written, other = pair.rows
    # Rows of one stride can lie between each other, as the two sides of one array do.
    return not stride or distance % stride < other or -distance % stride < written


def _layout(array: Any) -> Any:
    return array.shape, None if array._c_contiguous else array.strides


def overlap(parameters: tuple[Parameter, ...], pair: Neighbours, where: str) -> InputError:
    """The error for an output that lies in the memory of another array."""
    names = [p.name for p in parameters if p.dims is not None]
    return InputError(
        f"{names[pair.written]} shares memory with {names[pair.other]}",
        where=where,
        remedy="Give an output memory of its own, or, where the op works in place, the very "
        "same array.",
    )
