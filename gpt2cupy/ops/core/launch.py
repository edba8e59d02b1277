"""launch(): check a kernel's arguments, cast its scalars, start it. The only user of RawModule.

A kernel declares its parameters once, in the order of its C signature::

    Kernel("norm.cu", "layer_norm",
           "x: float32[N,C], weight: ELEM[C], bias: ELEM[C], out: ELEM[N,C], eps: float, N, C")

Letters in brackets are bound by the first array that has them and must agree
afterwards; a letter that stands alone passes what was bound as an int. So sizes
cannot contradict the arrays, and nothing is left for the kernel to trust.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import CompileError, InputError
from . import compiler
from .device import cupy_module as cupy_module
from .device import current_device as current_device
from .device import device_arch as device_arch
from .device import has_clusters as has_clusters
from .device import has_mma as has_mma
from .device import memory_error as memory_error
from .device import shared_limit as shared_limit
from .device import sm_count as sm_count
from .tape import Later, Launch, recording, submit

ALIGNMENT = 16  # bytes: kernels use 16-byte accesses
NULL = np.uintp(0)
# What this process loaded: source, architecture and macros -> the cubin.
loaded: dict[tuple[str, ...], Path] = {}
PLAIN_SHARED = 48 << 10  # bytes of dynamic shared memory that need no permission


class Parameter(NamedTuple):
    """One parameter of a kernel: an array (dtype and dims), a scalar (cast) or a bound letter."""

    name: str
    dtype: np.dtype | None  # of an array; None stands for ELEM
    dims: tuple[str | int, ...] | None
    cast: Any  # of a scalar
    optional: bool


_SCALARS = {"int": np.int32, "float": np.float32, "int64": np.int64}
_ARRAY = re.compile(r"(\w+): (\w+)\[([\w,]*)\](\??)$")


def _parse(text: str) -> Parameter:
    if match := _ARRAY.match(text):
        name, dtype, dims, optional = match.groups()
        letters = tuple(int(d) if d.isdigit() else d for d in dims.split(","))
        return Parameter(
            name, None if dtype == "ELEM" else np.dtype(dtype), letters, None, bool(optional)
        )
    name, _, kind = text.partition(": ")
    return Parameter(name, None, None, _SCALARS[kind] if kind else None, False)


class Kernel:
    """An ``extern "C"`` entry of a source file and the types of its parameters.

    Parameters
    ----------
    source, entry : str
        File in cuda_src and function in it.
    signature : str
        Parameters as the module's docstring shows them.
    overlaps : bool
        Whether it calls ``griddepcontrol_wait``: then it may start before its
        predecessor ends. A kernel that does not must be launched the plain way.
    writes_weights : bool
        Whether it writes what the next one may load before it waits: then that one
        starts when this has ended.
    cooperative : bool
        Whether its blocks wait for each other: then the launch is refused where they
        cannot all run at once, and the next kernel starts when it has ended.
    macros : mapping
        Those that this entry needs beside element type and sizes, where its source is
        compiled for each entry.
    """

    def __init__(
        self,
        source: str,
        entry: str,
        signature: str,
        *,
        overlaps: bool = False,
        writes_weights: bool = False,
        cooperative: bool = False,
        macros: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        self.entry = entry
        self.overlaps = overlaps
        self.writes_weights = writes_weights
        self.cooperative = cooperative
        self.macros = macros or {}
        self.parameters = tuple(_parse(part) for part in re.split(r",\s+", signature))

    def defines(
        self, elem: np.dtype | None, head_size: int | None, inner: int | None
    ) -> dict[str, str]:
        """The macros that its source is compiled with for an element type and sizes."""
        macros = compiler.macros(self.source)
        defines = dict(self.macros)
        if "ELEM" in macros:
            name = np.dtype(elem).name
            if name not in compiler.ELEMENT_TYPES:
                raise InputError(
                    f"kernels have no element type {name}",
                    where=self.source,
                    remedy=f"Use {', '.join(compiler.ELEMENT_TYPES)}.",
                )
            defines["ELEM"] = compiler.ELEMENT_TYPES[name]
        if "HS" in macros:
            if head_size is None or not 1 <= head_size <= compiler.MAX_HEAD_SIZE:
                raise InputError(
                    f"attention kernels take head sizes up to {compiler.MAX_HEAD_SIZE}, "
                    f"not {head_size}",
                    where=self.source,
                    remedy="Run this model with device='cpu'.",
                )
            defines["HS"] = str(head_size)
        if "K" in macros:
            defines["K"] = str(inner)
        return defines


def load(source: str, defines: Mapping[str, str], cooperative: bool = False) -> Any:
    """The RawModule of a source compiled with some macros, on the current device."""
    return _load(current_device(), source, tuple(sorted(defines.items())), cooperative)


@functools.cache
def _load(device: int, source: str, defines: tuple[tuple[str, str], ...], cooperative: bool) -> Any:
    import cupy

    path = compiler.cubin(source, dict(defines), device_arch(device))
    module = cupy.RawModule(path=str(path), enable_cooperative_groups=cooperative)
    try:
        module.compile()
    except cupy.cuda.driver.CUDADriverError as error:
        raise CompileError(
            f"the driver refused a kernel: {error}",
            where=str(path),
            remedy="Delete the file; it is compiled again at the next start. If that does not "
            "help, the driver is older than NVRTC: update it, or install the extra that fits it.",
        ) from error
    about = tuple(f"{name}={value}" for name, value in defines)
    loaded[(source, device_arch(device)) + about] = path  # noqa: RUF005 (Python 3.10 in an index)
    return module


@functools.cache
def _function(
    device: int,
    kernel: Kernel,
    elem: np.dtype | None,
    head_size: int | None,
    inner: int | None,
    shared: int,
) -> Any:
    defines = kernel.defines(elem, head_size, inner)
    function = load(kernel.source, defines, kernel.cooperative).get_function(kernel.entry)
    if shared > PLAIN_SHARED:
        function.max_dynamic_shared_size_bytes = shared_limit() - function.shared_size_bytes
    return function


@functools.cache
def _requested(
    device: int,
    kernel: Kernel,
    elem: np.dtype | None,
    head_size: int | None,
    inner: int | None,
    shared: int,
) -> Later:
    """The function of a launch that is recorded: it is compiled meanwhile."""
    compiler.request(kernel.source, kernel.defines(elem, head_size, inner), device_arch(device))
    return Later(lambda: _function(device, kernel, elem, head_size, inner, shared))


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: tuple[Any, ...],
    *,
    elem: np.dtype | None = None,
    head_size: int | None = None,
    inner: int | None = None,
    shared: int = 0,
) -> None:
    """Check ``args`` against the kernel's signature and launch it on the current stream.

    Parameters
    ----------
    kernel : Kernel
    grid, block : tuple of int
        Blocks, and threads of a block.
    args : tuple
        One value for each array and scalar of the signature, in its order;
        letters that stand alone take none. None is a null pointer where the
        parameter is marked optional.
    elem : numpy.dtype
        What ELEM stands for.
    head_size : int, optional
        What HS stands for.
    inner : int, optional
        What K stands for, where the source has it as a macro.
    shared : int
        Bytes of dynamic shared memory of a block; at most ``shared_limit()``.

    Raises
    ------
    InputError
        If an array has another dtype, shape or device than the kernel takes, is
        not C-contiguous, or does not start at a multiple of 16 bytes.
    """
    device = current_device()
    bound: dict[str, int] = {} if head_size is None else {"HS": head_size}
    if inner is not None:
        bound["K"] = inner
    values: list[Any] = []
    given = iter(args)
    for parameter in kernel.parameters:
        name, dtype, dims, cast, optional = parameter
        if dims is None:
            values.append(np.int32(bound[name]) if cast is None else cast(next(given)))
            continue
        array = next(given)
        if array is None and optional:
            values.append(NULL)
            continue
        shape = array.shape
        # One comparison each on the way through; what exactly is wrong is found out only then.
        if array.dtype != (dtype or elem) or len(shape) != len(dims):
            _refuse(kernel, parameter, array, elem, bound)
        for size, letter in zip(shape, dims, strict=True):
            if size != (bound.setdefault(letter, size) if isinstance(letter, str) else letter):
                _refuse(kernel, parameter, array, elem, bound)
        data = array.data
        misaligned = data.ptr % ALIGNMENT and data.ptr % _granule(array)
        if not array._c_contiguous or misaligned or data.device_id != device:
            _refuse(kernel, parameter, array, elem, bound)
        values.append(array)
    of = device, kernel, elem, head_size, inner, shared
    function = _requested(*of) if recording() else _function(*of)
    submit(
        Launch(
            function,
            grid,
            block,
            tuple(values),
            kernel.overlaps,
            shared,
            kernel.writes_weights or kernel.cooperative,
        )
    )


def _granule(array: Any) -> int:
    """The alignment a kernel may count on: that of a row, up to 16 bytes.

    A row of 59 halves takes 118 bytes, so only the first row of such an array
    can be aligned further; kernels then use narrower accesses. Integers are
    read one by one, but for int8, which are weights.
    """
    if array.dtype.kind in "iu" and array.dtype != np.int8:
        return array.itemsize
    row = array.shape[-1] * array.itemsize
    return min(row & -row, ALIGNMENT)


def _refuse(
    kernel: Kernel, parameter: Parameter, array: Any, elem: Any, bound: dict[str, int]
) -> None:
    expected = np.dtype(parameter.dtype or elem).name
    assert parameter.dims is not None
    dims = ", ".join(f"{d}={bound[d]}" if d in bound else str(d) for d in parameter.dims)
    contiguous = "contiguous" if array.flags.c_contiguous else "not contiguous"
    raise InputError(
        f"{parameter.name} is {array.dtype.name}{list(array.shape)}, {contiguous}, on device "
        f"{array.data.device_id} at address 0x{array.data.ptr:x}; the kernel takes a contiguous "
        f"{expected}[{dims}] on device {current_device()}, aligned to {_granule(array)} bytes",
        where=f"{kernel.source}: {kernel.entry}",
        remedy="Nothing is copied or cast silently: convert or copy the array first.",
    )


def is_device_array(array: Any) -> bool:
    """Whether an array lives on a GPU; does not import CuPy to find out."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def device_empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised array on the current device."""
    import cupy

    return cupy.empty(shape, dtype)
