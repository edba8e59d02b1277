"""Launches on tensors: checked on CuPy arrays over their memory, then found again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from ..ops.core.device import cupy_module
from ..ops.core.plan import Plan, can_be_planned, keep, places_of
from ..ops.core.tape import recorded
from .operators import refuse_host, register

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
# A build of PyTorch without CUDA has neither.
_CURRENT_DEVICE: Any = getattr(torch._C, "_cuda_getDevice", None)
_CURRENT_STREAM: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


def launches(
    schema: str,
    outputs: Callable[..., Any],
    scratch: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Callable[[Callable[..., Any]], Any]:
    """Registers an op of :mod:`gpt2cupy.ops` as an operator on CUDA tensors.

    The decorated function takes CuPy arrays, the tensors of the schema, of ``outputs`` and of
    ``scratch``, and then the other arguments of the schema: it calls the op with its ``out``.
    It runs when shapes, strides, dtypes, device or settings are new. From then on its launches
    are found by these, and only their pointers change.

    Parameters
    ----------
    schema : str
        The tensors come first, and the first is never None.
    outputs, scratch : callable
        Take the arguments of the schema, and make what is returned, and a tuple of what is
        needed beside it. What they make follows from the shapes, strides and dtypes of tensors
        and from the other arguments.
    """

    def decorate(kernels: Callable[..., Any]) -> Any:
        name = schema.partition("(")[0]
        scope: dict[str, Any] = {}
        exec(
            compile(_text(torch._C.parse_schema(schema), scratch is not None), __file__, "exec"),
            scope,
        )
        run = scope["make_run"](
            name, outputs, scratch, lambda *rest: _checked(name, kernels, *rest)
        )
        return scope["make_call"](run, register(schema, run, outputs))

    return decorate


def _text(schema: Any, scratch: bool) -> str:
    """The operator written out for its arguments, since it runs at every call."""
    names = [each.name for each in schema.arguments]
    tensors = [each for each in schema.arguments if "Tensor" in str(each.type)]
    optional = {each.name for each in tensors if "Optional" in str(each.type)}
    taken = ", ".join(names)
    settings = "".join(f"{name}, " for name in names[len(tensors) :])
    lines, facts = [], ["name", "device"]
    for place, tensor in enumerate(tensors):
        pointer, *found = (f"{fact}{place}" for fact in ("pointer", "layout", "dtype", "device"))
        layout, dtype, device = found
        read = [
            f"{pointer} = {tensor.name}.data_ptr()",
            f"{layout} = {tensor.name}.shape",
            f"if not {tensor.name}.is_contiguous(): {layout} = ({layout}, {tensor.name}.stride())",
            f"{dtype} = {tensor.name}.dtype",
            f"{device} = {tensor.name}.get_device()",
        ]
        if tensor.name in optional:
            missing = f"    {pointer} = 0; {' = '.join(found)} = None"
            read = [f"if {tensor.name} is None:", missing, "else:", *(f"    {r}" for r in read)]
        elif not place:
            read.pop()
            found.pop()
        lines += read
        facts += found
    pointers = [f"pointer{place}" for place in range(len(tensors))]
    made = [f"made{place}" for place in range(len(schema.returns))]
    given = [each.name for each in tensors] + made
    lines.append(f"{', '.join(made)} = outputs({taken})")
    pointers += [f"{each}.data_ptr()" for each in made]
    if scratch:
        lines.append(f"working = scratch({taken})")
        pointers.append("*[each.data_ptr() for each in working]")
        given.append("*working")
    body = "".join(f"        {line}\n" for line in lines)
    return f"""
from gpt2cupy.torch.launches import _CURRENT_DEVICE, _CURRENT_STREAM, _on_its_device, _plans
from gpt2cupy.torch.operators import direct, traced

def make_run(name, outputs, scratch, first):
    def run({taken}):
        device = {names[0]}.get_device()
        if _CURRENT_DEVICE() != device:
            tensors = ({", ".join(each.name for each in tensors)},)
            return _on_its_device(name, device, tensors, run, ({taken},))
{body}
        key = ({", ".join(facts)}, {settings})
        pointers = ({", ".join(pointers)}, 0)
        plan = _plans.known.get(key)
        if plan is None or not (pointers in plan.checked or plan.admits(pointers)):
            plan = first(key, ({", ".join(given)},), ({settings}), device)
        plan.run_on(_CURRENT_STREAM(device), pointers)
        return {", ".join(made)}
    return run

def make_call(run, dispatched):
    def call({taken}):
        if traced() or not direct({", ".join(each.name for each in tensors)}):
            return dispatched({taken})
        return run({taken})
    return call
"""


def _on_its_device(
    name: str,
    device: int,
    tensors: tuple[Tensor | None, ...],
    run: Callable[..., Any],
    args: tuple[Any, ...],
) -> Any:
    """``run`` where the first tensor is, which is another GPU than the current one, or none."""
    refuse_host(name, tensors)
    with torch.cuda.device(device):
        return run(*args)


def run(
    name: str, call: Callable[..., Any], tensors: tuple[Tensor | None, ...], *rest: Any
) -> None:
    """``call`` of :mod:`gpt2cupy.ops` on tensors, followed by what else it takes.

    For operators that :func:`launches` does not describe. The first tensor is never None.
    """
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if _CURRENT_DEVICE() != device:
        return _on_its_device(name, device, tensors, run, (name, call, tensors, *rest))
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
        plan = _checked(name, call, key, tensors, rest, device)
    plan.run_on(_CURRENT_STREAM(device), given)
    return None


def _checked(
    name: str,
    call: Callable[..., Any],
    key: Any,
    tensors: Sequence[Tensor | None],
    rest: tuple[Any, ...],
    device: int,
) -> Plan:
    """The plan of a call of an op, checked and kept."""
    refuse_host(name, tuple(tensors))
    # This thread may not have touched the GPU yet: setting its device gives it the context.
    cupy_module().cuda.runtime.setDevice(device)
    views = [None if tensor is None else view(tensor) for tensor in tensors]
    with recorded() as calls:
        call(*views, *rest)
    recorded_launches: list[Any] = calls
    places = places_of(recorded_launches, views)
    assert places is not None and all(map(can_be_planned, recorded_launches)), call
    plan = Plan(recorded_launches, places, len(views) + 1, device)
    keep(_plans.known, key, plan)
    return plan


def view(tensor: Tensor) -> Any:
    """A CuPy array over a tensor's memory."""
    import cupy

    # Bytes are what cuBLASLt works in; given for anything else the op refuses them.
    dtype = np.dtype(np.uint8) if tensor.dtype is torch.uint8 else DTYPES.get(tensor.dtype)
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
