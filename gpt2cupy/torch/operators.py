"""Operators of ``torch.ops.gpt2cupy``: how one is registered, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

_PLAIN = (Tensor, torch.nn.Parameter)
LIBRARY: Any = torch.library.Library("gpt2cupy", "DEF")  # type: ignore[no-untyped-call]


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Registers a function as an operator on CUDA tensors; on others it is refused by name."""
    name = schema.partition("(")[0]

    def register(implementation: Callable[..., Any]) -> Any:
        LIBRARY.define(schema, tags=(torch.Tag.needs_exact_strides,))
        LIBRARY.impl(name, implementation, "CUDA")
        LIBRARY.impl(name, lambda *args: _refuse_host(name, args), "CPU")
        torch.library.register_fake(f"gpt2cupy::{name}", fake, lib=LIBRARY)
        dispatched = getattr(torch.ops.gpt2cupy, name).default

        def call(*args: Any) -> Any:
            if _direct(*[given for given in args if isinstance(given, Tensor)]):
                return implementation(*args)
            return dispatched(*args)

        return call

    return register


def _refuse_host(name: str, args: tuple[Any, ...]) -> None:
    schema = getattr(torch.ops.gpt2cupy, name).default._schema
    for parameter, given in zip(schema.arguments, args, strict=False):
        if isinstance(given, Tensor) and given.device.type == "cpu":
            raise InputError(
                f"{parameter.name} is on the CPU",
                where=f"gpt2cupy.torch.{name}",
                remedy="Nothing is copied silently: move it to the GPU, or give gpt2cupy.ops a "
                "NumPy array.",
            )


def refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    """Raise where autograd would want a gradient that no kernel computes."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise InputError(
            "an input needs a gradient, and this op has none",
            where=f"gpt2cupy.torch.{name}",
            remedy="Call it under torch.no_grad(), or detach the inputs.",
        )


def _direct(*tensors: Tensor | None) -> bool:
    """Whether a call can do without PyTorch's dispatcher, which takes longer than a launch.

    It can where nobody would see it there: plain tensors on a GPU, no tracing, no gradient.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    graded = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN or not tensor.is_cuda:
            return False
        if (graded and tensor.requires_grad) or torch._C._functorch.is_functorch_wrapped_tensor(
            tensor
        ):
            return False
    return True


def like(x: Tensor, weight: Tensor | None = None) -> Tensor:
    """What a norm of x is written to."""
    if (weight is None or weight.dtype == x.dtype) and x.is_contiguous():
        return torch.empty_like(x)
    return torch.empty(x.shape, dtype=(x if weight is None else weight).dtype, device=x.device)
