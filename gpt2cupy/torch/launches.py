"""Launches on tensors: checked on CuPy arrays over their memory, then found again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ops.core.device import cupy_module
from ..ops.core.tape import Prepared, recorded

DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}
_KNOWN = 4096  # signatures that a thread remembers


class _Programs(threading.local):
    """Launches that this thread has checked, by what the checks rest on."""

    def __init__(self) -> None:
        self.known: dict[Any, list[tuple[Prepared, tuple[int, ...]]]] = {}


_programs = _Programs()


def run(
    name: str, call: Callable[..., Any], tensors: tuple[Tensor | None, ...], *rest: Any
) -> None:
    """``call`` of :mod:`gpt2cupy.ops` on tensors, followed by what else it takes.

    The first time it runs on CuPy arrays over the tensors' memory, and its launches are kept; a
    call with tensors of the same shapes, strides, dtypes and device only changes their pointers.
    The first tensor is never None.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return run(name, call, tensors, *rest)
    facts: list[Any] = [name, rest]
    pointers, bits = [], 0
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
            pointers.append(0)
            continue
        shape = tensor.shape
        layout = shape if tensor.is_contiguous() else (shape, tensor.stride())
        facts += (layout, tensor.dtype, tensor.get_device())
        pointer = tensor.data_ptr()
        pointers.append(pointer)
        bits |= pointer
    pointers.append(0)  # the last: of an array that no tensor is
    key = tuple(facts)
    program = _programs.known.get(key)
    if program is None or bits % 16:
        program = _checked(call, tensors, rest, device)
        if len(_programs.known) >= _KNOWN:
            _programs.known.clear()
        if not bits % 16:
            _programs.known[key] = program
    stream = torch._C._cuda_getCurrentRawStream(device)
    for prepared, places in program:
        prepared.run_on(stream, [pointers[place] for place in places])
    return None


def _checked(
    call: Callable[..., Any], tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], device: int
) -> list[tuple[Prepared, tuple[int, ...]]]:
    """The launches of ``call``, checked, and for each array of theirs the tensor it is."""
    # This thread may not have touched the GPU yet: setting its device gives it the context.
    cupy_module().cuda.runtime.setDevice(device)
    views = [None if tensor is None else view(tensor) for tensor in tensors]
    with recorded() as calls:
        call(*views, *rest)
    launches: list[Any] = calls
    places = {id(view): place for place, view in enumerate(views) if view is not None}
    program = []
    for launch in launches:
        launch.load()
        prepared = Prepared(launch, device)
        taken = launch.values[: prepared.arrays]
        program.append((prepared, tuple(places.get(id(value), -1) for value in taken)))
    return program


def view(tensor: Tensor) -> Any:
    """A CuPy array over a tensor's memory."""
    import cupy

    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InputError(
            f"kernels take no tensors of {tensor.dtype}",
            where="gpt2cupy.torch",
            remedy=f"Use {', '.join(str(known).removeprefix('torch.') for known in DTYPES)}.",
        )
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    last = sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + dtype.itemsize
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), max(last, 1), tensor, tensor.get_device())
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    return cupy.ndarray(tuple(tensor.shape), dtype, pointer, strides)
