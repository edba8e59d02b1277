"""What a kernel takes: its parameters, read from a text, and arrays checked against them.

A kernel declares its parameters once, in the order of its C signature::

    Kernel("rms_norm.cu", "rms_norm",
           "x: ELEM[*N,C], weight: ELEM[C]?, out: ELEM[*N,C]~, eps: float, N, C, x_stride, "
           "out_stride")

Letters in brackets are bound by the first array that has them and must agree
afterwards; a letter that stands alone passes what was bound as an int. So sizes
cannot contradict the arrays, and nothing is left for the kernel to trust.

A first letter with a star stands for any number of leading dimensions, of which
the letter is the product. Such an array may be a view with one row stride,
which the name with ``_stride`` passes, in elements.

After the brackets: ``?`` for an array that may be None, ``!`` for one that is
written and shares no memory with another, ``~`` for one that is written and may
be one of the others itself, with the same layout: one with a star, or of the same
letters. ``@`` for one that may have any strides but that of its last dimension, which
must lie together: ``q_stride_T`` passes the stride of q's letter T in elements.

``q_tiles: tiles[q,128]`` passes a tensor map of q, an array [B, T, H, C], whose tiles have 128
rows; no argument is given for it.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import numpy as np

from ...errors import InputError
from .tensor_map import tiles_of

ALIGNMENT = 16  # bytes: kernels use 16-byte accesses
NULL = np.uintp(0)
_LARGEST = 2**31 - 1  # stride in elements

_SCALARS = {"int": np.int32, "float": np.float32, "int64": np.int64}
_TILES = re.compile(r"(\w+): tiles\[(\w+),(\d+)\]$")
_ARRAY = re.compile(r"(\w+): (\w+)\[([*\w,]*)\]([?!~@]*)$")


class Parameter(NamedTuple):
    """One parameter of a kernel: an array (dtype and dims), a scalar (cast) or a bound letter."""

    name: str
    dtype: np.dtype | None  # of an array; None stands for ELEM
    dims: tuple[str | int, ...] | None
    cast: Any  # of a scalar
    optional: bool = False
    leads: bool = False  # the first letter stands for all leading dimensions
    written: bool = False
    in_place: bool = False  # it may be an input itself
    strided: bool = False  # all dimensions but the last may have any stride
    tiles: tuple[str, int] | None = None  # of which array, and the rows of one


def parse(text: str) -> Parameter:
    """A parameter from the text that declares it."""
    if match := _TILES.match(text):
        name, array, rows = match.groups()
        return Parameter(name, None, None, None, tiles=(array, int(rows)))
    if match := _ARRAY.match(text):
        name, dtype, dims, marks = match.groups()
        letters = tuple(int(d) if d.isdigit() else d for d in dims.lstrip("*").split(","))
        return Parameter(
            name,
            None if dtype == "ELEM" else np.dtype(dtype),
            letters,
            None,
            "?" in marks,
            dims.startswith("*"),
            "!" in marks or "~" in marks,
            "~" in marks,
            "@" in marks,
        )
    name, _, kind = text.partition(": ")
    return Parameter(name, None, None, _SCALARS[kind] if kind else None)


def array_facts(name: str, number: int, optional: bool) -> tuple[list[str], list[str]]:
    """Lines of Python that read what checks of an array rest on, and the names they set.

    They set ``pointer<number>`` too, to 0 for None. Written out, since they run at every call: a
    loop takes twice as long.
    """
    pointer, *facts = (f"{fact}{number}" for fact in ("pointer", "layout", "dtype", "device"))
    layout, dtype, device = facts
    lines = [
        f"memory = {name}.data",
        f"{pointer} = memory.ptr",
        f"{layout} = {name}.shape",
        f"if not {name}._c_contiguous: {layout} = ({layout}, {name}.strides)",
        f"{dtype} = {name}.dtype",
        f"{device} = memory.device_id",
    ]
    if optional:
        missing = f"    {pointer} = 0; {' = '.join(facts)} = None"
        lines = [f"if {name} is None:", missing, "else:", *(f"    {line}" for line in lines)]
    return lines, facts


def facts_reader(parameters: tuple[Parameter, ...]) -> Any:
    """A function of a launch's settings and arguments: what its checks rest on, and its pointers.

    It returns (facts, pointers): a key under which a checked launch is found again, and the
    address of each array (0 for None).
    """
    settings = ["kernel", "device", "grid", "block", "elem", "head_size", "inner", "shared"]
    facts, names, lines, arrays = list(settings), [], [], 0
    for parameter in parameters:
        if parameter.dims is not None:
            read, found = array_facts(parameter.name, arrays, parameter.optional)
            lines += read
            facts += found
            arrays += 1
        elif parameter.cast is not None:
            facts.append(parameter.name)
        else:
            continue
        names.append(parameter.name)
    pointers = "".join(f"pointer{number}, " for number in range(arrays))
    lines.append(f"return ({', '.join(facts)}), ({pointers})")
    body = "".join(f"    {line}\n" for line in lines)
    scope: dict[str, Any] = {}
    exec(f"def facts({', '.join([*settings, *names])}):\n{body}", scope)
    return scope["facts"]


class Refusal(Exception):
    """An array does not fit its parameter; says only which."""

    def __init__(self, parameter: Parameter, array: Any) -> None:
        self.parameter, self.array = parameter, array


def bind(
    parameters: tuple[Parameter, ...],
    args: tuple[Any, ...],
    elem: np.dtype | None,
    bound: dict[str, int],
    device: int,
) -> tuple[Any, ...]:
    """The kernel's arguments: arrays as they are, scalars cast, letters bound.

    Raises
    ------
    Refusal
        For the first array of another dtype, shape, layout, alignment or device.
    """
    values: list[Any] = []
    arrays: dict[str, Any] = {}
    given = iter(args)
    for parameter in parameters:
        name, dtype, dims, cast, optional, leads, *_, strided, tiles = parameter
        if tiles is not None:
            values.append(tiles_of(arrays[tiles[0]], tiles[1]))
            continue
        if dims is None:
            values.append(np.int32(bound[name]) if cast is None else cast(next(given)))
            continue
        array = next(given)
        if array is None and optional:
            values.append(NULL)
            # Nothing is read with the stride of what is not there.
            bound.setdefault(f"{name}_stride", 0)
            continue
        shape = array.shape
        # One comparison each on the way through; what exactly is wrong is found out only then.
        if array.dtype != (dtype or elem):
            raise Refusal(parameter, array)
        if leads:
            shape = rows(array, len(dims) - 1)
            if shape is None:
                raise Refusal(parameter, array)
            *shape, bound[f"{name}_stride"] = shape
        elif not (strided or array._c_contiguous):
            raise Refusal(parameter, array)
        if len(shape) != len(dims):
            raise Refusal(parameter, array)
        if strided:
            found = strides(array)
            if found is None:
                raise Refusal(parameter, array)
            bound |= {f"{name}_stride_{d}": s for d, s in zip(dims, found, strict=False)}
        for size, letter in zip(shape, dims, strict=True):
            if size != (bound.setdefault(letter, size) if isinstance(letter, str) else letter):
                raise Refusal(parameter, array)
        data = array.data
        if data.device_id != device or data.ptr % granule(array):
            raise Refusal(parameter, array)
        values.append(array)
        arrays[name] = array
    return tuple(values)


def rows(array: Any, kept: int) -> tuple[int, ...] | None:
    """Rows, the last ``kept`` sizes, and the row stride in elements; None without one stride.

    A row is the last ``kept`` dimensions, which must lie together.
    """
    shape = array.shape
    if len(shape) < kept:
        return None
    leading, row = shape[: len(shape) - kept], shape[len(shape) - kept :]
    length = math.prod(row)
    count = math.prod(leading)
    if array._c_contiguous:
        return (count, *row, length)
    if not kept:  # kernels read single values one after the other
        return None
    strides = [stride // array.itemsize for stride in array.strides]
    expected = 1
    for size, stride in zip(reversed(row), reversed(strides), strict=False):
        if size != 1 and stride != expected:
            return None
        expected *= size
    between = None  # elements from one row to the next
    expected = 0
    for size, stride in reversed(list(zip(leading, strides, strict=False))):
        if size == 1:
            continue
        if between is None:
            between = stride
        elif stride != expected:
            return None
        expected = stride * size
    if between is None:
        between = length
    return (count, *row, between) if between >= length else None


def strides(array: Any) -> tuple[int, ...] | None:
    """The strides of all dimensions but the last, in elements; None where a kernel takes others.

    They are 0 where there is no second element. The last dimension must lie together, no stride
    may be negative, and each must be a number of elements. Those of an array without elements,
    which CuPy makes with strides of 0, say nothing.
    """
    if 0 in array.shape:
        return (0,) * (len(array.shape) - 1)
    *leading, last = zip(array.shape, array.strides, strict=True)
    size = array.itemsize
    if last[0] > 1 and last[1] != size:
        return None
    found = tuple(stride if count > 1 else 0 for count, stride in leading)
    if any(s < 0 or s % size or s // size > _LARGEST for s in found):
        return None
    return tuple(s // size for s in found)


def granule(array: Any) -> int:
    """The alignment a kernel may count on: that of a row, up to 16 bytes.

    A row of 59 fp16 elements takes 118 bytes, so only the first row of such an array
    can be aligned further; kernels then use narrower accesses. Integers are
    read one by one, but for int8, which are weights.
    """
    if array.dtype.kind in "iu" and array.dtype != np.int8:
        return array.itemsize
    row = array.shape[-1] * array.itemsize if array.shape else array.itemsize
    if not array._c_contiguous:
        for size, stride in zip(array.shape[:-1], array.strides, strict=False):
            if size != 1:
                row |= abs(stride)
    return min(row & -row, ALIGNMENT) or ALIGNMENT


def refusal(
    refused: Refusal, where: str, elem: np.dtype | None, bound: dict[str, int], device: int
) -> InputError:
    """The error that says what an array is and what the kernel takes."""
    parameter, array = refused.parameter, refused.array
    expected = np.dtype(parameter.dtype or elem).name
    assert parameter.dims is not None
    dims = ", ".join(f"{d}={bound[d]}" if d in bound else str(d) for d in parameter.dims)
    contiguous = "contiguous" if array.flags.c_contiguous else "not contiguous"
    takes = "contiguous"
    if parameter.strided:
        takes = "a tensor with its last dimension contiguous:"
    if parameter.leads:
        dims = f"..., {dims.partition(', ')[2]}"
        if "N" in bound:
            dims += f" with N={bound['N']} rows"
        takes = "contiguous or evenly spaced rows of"
    return InputError(
        f"{parameter.name} is {array.dtype.name}{list(array.shape)}, {contiguous}, on device "
        f"{array.data.device_id} at address 0x{array.data.ptr:x}; the kernel takes "
        f"{'a ' if takes == 'contiguous' else ''}{takes} "
        f"{expected}[{dims}] on device {device}, aligned to {granule(array)} bytes",
        where=where,
        remedy="Nothing is copied or cast silently: convert or copy the array first.",
    )


def foreign(parameters: tuple[Parameter, ...], args: tuple[Any, ...], where: str) -> InputError:
    """The error for what is no array of a GPU."""
    taken = [p for p in parameters if p.dims is not None or p.cast is not None]
    for parameter, given in zip(taken, args, strict=False):
        data = getattr(given, "data", None)
        absent = given is None and parameter.optional
        if parameter.dims is not None and not absent and not hasattr(data, "device_id"):
            kind = f"{type(given).__module__}.{type(given).__qualname__}"
            return InputError(
                f"{parameter.name} is a {kind}, not an array on the GPU",
                where=where,
                remedy="Nothing is copied silently: move it there first, by cupy.asarray.",
            )
    return InputError("arguments are missing", where=where, remedy="Give one for each parameter.")
