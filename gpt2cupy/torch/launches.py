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
from ..ops.core.plan import Plan, can_be_planned, keep, places_of
from ..ops.core.tape import recorded

DTYPES = {
    torch.float32: np.dtype(np.float32),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
    torch.int32: np.dtype(np.int32),
    torch.int64: np.dtype(np.int64),
}


class _Plans(threading.local):
    """Calls that this thread has checked, by what the checks rest on."""

    def __init__(self) -> None:
        self.known: dict[Any, Plan] = {}


_plans = _Plans()


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
    pointers = []
    for tensor in tensors:
        if tensor is None:
            facts.append(None)
            pointers.append(0)
            continue
        facts += (
            tensor.shape,
            None if tensor.is_contiguous() else tensor.stride(),
            tensor.dtype,
            tensor.get_device(),
        )
        pointers.append(tensor.data_ptr())
    pointers.append(0)
    key, given = tuple(facts), tuple(pointers)
    plan = _plans.known.get(key)
    if plan is None or not plan.admits(given):
        plan = _checked(call, tensors, rest, device)
        keep(_plans.known, key, plan)
    plan.run_on(torch._C._cuda_getCurrentRawStream(device), given)
    return None


def _checked(
    call: Callable[..., Any], tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], device: int
) -> Plan:
    """The plan of a call of an op, checked."""
    # This thread may not have touched the GPU yet: setting its device gives it the context.
    cupy_module().cuda.runtime.setDevice(device)
    views = [None if tensor is None else view(tensor) for tensor in tensors]
    with recorded() as calls:
        call(*views, *rest)
    launches: list[Any] = calls
    places = places_of(launches, views)
    assert places is not None and all(map(can_be_planned, launches)), call
    return Plan(launches, places, len(views) + 1, device)


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
