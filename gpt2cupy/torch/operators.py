"""Operators of ``torch.ops.gpt2cupy``: how one is registered, and what it refuses."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import InputError, shown

F = TypeVar("F", bound=Callable[..., Any])

PLAIN = (Tensor, torch.nn.Parameter)
# Functions that every call asks: a name of this module is one look-up, torch.x.y is three.
_COMPILING = torch.compiler.is_dynamo_compiling
_MODES = torch._C._len_torch_dispatch_stack
_INTERPRETER = torch._C._functorch.peek_interpreter_stack
_GRADED = torch.is_grad_enabled
LIBRARY: Any = torch.library.Library("gpt2cupy", "DEF")  # type: ignore[no-untyped-call]


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An operator on CUDA tensors; on others it is refused by name."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
    LIBRARY.impl(name, implementation, "CUDA")
    LIBRARY.impl(name, lambda *args: refuse_host(name, args), "CPU")
    torch.library.register_fake(f"gpt2cupy::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.gpt2cupy, name).default


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as an operator; a call of it does without the dispatcher if it can."""

    def decorate(implementation: Callable[..., Any]) -> Any:
        dispatched = register(schema, implementation, fake)

        def call(*args: Any) -> Any:
            if traced() or not direct(*[given for given in args if isinstance(given, Tensor)]):
                return dispatched(*args)
            return implementation(*args)

        return call

    return decorate


def traced() -> bool:
    """Whether something of PyTorch follows what is called, which only sees its operators.

    PyTorch's dispatcher takes longer than a launch, so a call does without it where nobody
    would see it there.
    """
    return (
        _COMPILING() or _MODES() > 0 or _INTERPRETER() is not None or forward_ad._current_level >= 0
    )


def direct(*tensors: Tensor | None) -> bool:
    """Whether tensors are plain ones on a GPU, of which no gradient is asked, or left out."""
    graded = _GRADED()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in PLAIN or not tensor.is_cuda or (graded and tensor.requires_grad):
            return False
    return True


def refuse_host(name: str, args: tuple[Any, ...]) -> None:
    """Raise for the first tensor that is not on a GPU."""
    schema = getattr(torch.ops.gpt2cupy, name).default._schema
    for parameter, given in zip(schema.arguments, args, strict=False):
        if isinstance(given, Tensor) and not given.is_cuda:
            where = "CPU" if given.device.type == "cpu" else f"device {given.device}"
            raise InputError(
                f"{parameter.name} is on the {where}",
                where=f"gpt2cupy.torch.{name}",
                remedy="Nothing is copied silently: move it to the GPU, or give gpt2cupy.ops a "
                "NumPy array.",
            )


_KINDS: dict[str, tuple[type, ...]] = {
    "Tensor": (Tensor,),
    "None": (type(None),),
    "bool": (bool,),
    "int": (int,),
    "float": (float, int),
    "str": (str,),
}


def refuses_types(function: F) -> F:
    """Of a function on tensors: what it cannot take is refused by name.

    PyTorch's dispatcher has other errors for it, which are looked at only when there is one.
    """
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            return function(*args, **options)
        except (AttributeError, TypeError, RuntimeError, OverflowError):
            for name, value in signature.bind(*args, **options).arguments.items():
                _refuse_type(function.__name__, name, value, signature.parameters[name].annotation)
            raise

    return call  # type: ignore[return-value]


def _refuse_type(function: str, name: str, value: Any, annotation: str) -> None:
    kinds = annotation.split(" | ")
    fits = any(isinstance(value, _KINDS[kind]) for kind in kinds)
    if isinstance(value, bool) and "bool" not in kinds:
        fits = False
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        fits = False  # what PyTorch's integers hold
    if isinstance(value, str) and not value.isascii():
        fits = False  # a name of ours it is not, and some are none of PyTorch's either
    if not fits:
        raise InputError(
            f"{name}={shown(value)} is impossible",
            where=f"gpt2cupy.torch.{function}: {name}",
            remedy=f"It must be of {annotation.replace(' | ', ' or ')}.",
        )


def refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would want a gradient that no kernel computes."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise InputError(
            "an input needs a gradient, and this op has none",
            where=f"gpt2cupy.torch.{name}",
            remedy="Call it under torch.no_grad(), or detach the inputs.",
        )


def like(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a norm of x is written to."""
    if (weight is None or weight.dtype == x.dtype) and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=(x if weight is None else weight).dtype, device=x.device)
