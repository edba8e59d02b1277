"""launch(): check a kernel's arguments, cast its scalars, start it. The only user of RawModule.

How a kernel declares its parameters: :mod:`.signature`. A call whose arrays have the dtypes,
shapes, layouts and devices of an earlier one, and whose scalars are the same, is not checked
again: it is found by these facts, and only alignment and overlap are looked at.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import CompileError, InputError
from . import compiler, cuda_source
from .device import cupy_module as cupy_module
from .device import current_device as current_device
from .device import device_arch as device_arch
from .device import has_clusters as has_clusters
from .device import has_mma as has_mma
from .device import memory_error as memory_error
from .device import shared_limit as shared_limit
from .device import sm_count as sm_count
from .entries import check_entry
from .overlap import Neighbours, meet, neighbours, overlap
from .plan import Plan, can_be_planned, keep
from .signature import NULL as NULL
from .signature import Refusal, bind, facts_reader, foreign, parse, refusal
from .tape import THREAD, Later, Launch, submit

# What this process loaded: source, architecture and macros -> the cubin.
loaded: dict[tuple[str, ...], Path] = {}
PLAIN_SHARED = 48 << 10  # bytes of dynamic shared memory that need no permission


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
    waits_first : bool
        Whether it reads and writes nothing before ``griddepcontrol_wait``, so that it may be
        launched to overlap whatever precedes it.
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
        waits_first: bool = False,
        macros: Mapping[str, str] | None = None,
    ) -> None:
        self.source = source
        self.entry = entry
        self.overlaps = overlaps
        self.writes_weights = writes_weights
        self.cooperative = cooperative
        self.waits_first = waits_first
        self.macros = macros or {}
        self.parameters = tuple(parse(part) for part in re.split(r",\s+", signature))
        self.facts = facts_reader(self.parameters)
        names = [parameter.name for parameter in self.parameters]
        self.tiles_of = tuple(names.index(p.tiles[0]) for p in self.parameters if p.tiles)

    def defines(
        self, elem: np.dtype | None, head_size: int | None, inner: int | None
    ) -> dict[str, str]:
        """The macros that its source is compiled with for an element type and sizes."""
        macros = cuda_source.macros(self.source)
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
    check_entry(kernel.source, kernel.entry, kernel.parameters)
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
        not C-contiguous, or does not start at a multiple of 16 bytes; at the first
        launch, if the signature is not that of the source.
    """
    device = current_device()
    recording = THREAD.calls is not None
    try:
        key, pointers = kernel.facts(
            kernel, device, grid, block, elem, head_size, inner, shared, *args
        )
    except AttributeError:
        raise foreign(kernel.parameters, args, _where(kernel)) from None
    if not recording:
        plan = THREAD.known.get(key)
        if plan is not None and plan.admits(pointers):
            plan.run(pointers)
            return
    call = _checked(kernel, grid, block, args, pointers, device, elem, head_size, inner, shared)
    if 0 in grid:  # nothing to do, which the driver would refuse
        return
    submit(call)
    if not recording and can_be_planned(call):
        keep(THREAD.known, key, Plan([call], [range(len(pointers))], len(pointers), device))


def _refuse_meeting(kernel: Kernel, pair: Neighbours, pointers: Sequence[int]) -> None:
    if meet(pair, pointers[pair.written] - pointers[pair.other]):
        raise overlap(kernel.parameters, pair, _where(kernel))


def _where(kernel: Kernel) -> str:
    return f"{kernel.source}: {kernel.entry}"


def _checked(
    kernel: Kernel,
    grid: tuple[int, ...],
    block: tuple[int, ...],
    args: tuple[Any, ...],
    pointers: Sequence[int],
    device: int,
    elem: np.dtype | None,
    head_size: int | None,
    inner: int | None,
    shared: int,
) -> Launch:
    """The launch, or an error."""
    bound: dict[str, int] = {} if head_size is None else {"HS": head_size}
    if inner is not None:
        bound["K"] = inner
    try:
        values = bind(kernel.parameters, args, elem, bound, device)
    except Refusal as refused:
        raise refusal(refused, _where(kernel), elem, bound, device) from None
    pairs = neighbours(kernel.parameters, args)
    for pair in pairs:
        _refuse_meeting(kernel, pair, pointers)
    of = device, kernel, elem, head_size, inner, shared
    # What is recorded is compiled meanwhile.
    function = _function(*of) if THREAD.calls is None else _requested(*of)
    return Launch(
        function,
        grid,
        block,
        values,
        kernel.overlaps,
        shared,
        kernel.writes_weights or kernel.cooperative,
        kernel.cooperative,
        pairs,
        kernel.tiles_of,
        kernel.waits_first,
    )


def is_device_array(array: Any) -> bool:
    """Whether an array lives on a GPU; does not import CuPy to find out."""
    cupy = sys.modules.get("cupy")
    return cupy is not None and isinstance(array, cupy.ndarray)


def device_empty(shape: tuple[int, ...], dtype: Any) -> Any:
    """An uninitialised array on the current device."""
    import cupy

    return cupy.empty(shape, dtype)
