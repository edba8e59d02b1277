"""Layer norm and RMS norm of tensors, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..ops import norm_backward
from .launches import launches
from .operators import LIBRARY, like, refuse_gradient, refuses_types


@launches(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    lambda x, weight, eps: like(x, weight),
)
def _rms_norm(x: Any, weight: Any, out: Any, eps: float) -> None:
    ops.rms_norm(x, weight, eps, out=out)


@launches(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda x, weight, bias, eps: like(x, weight),
)
def _layer_norm(x: Any, weight: Any, bias: Any, out: Any, eps: float) -> None:
    ops.layer_norm(x, weight, bias, eps, out=out)


@launches(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (like(x, weight), like(residual)),
)
def _add_rms_norm(x: Any, residual: Any, weight: Any, y: Any, total: Any, eps: float) -> None:
    ops.add_rms_norm(x, residual, weight, eps, out=(y, total))


@launches(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)",
    lambda x, residual, weight, bias, eps: (like(x, weight), like(residual)),
)
def _add_layer_norm(
    x: Any, residual: Any, weight: Any, bias: Any, y: Any, total: Any, eps: float
) -> None:
    ops.add_layer_norm(x, residual, weight, bias, eps, out=(y, total))


def _parameter_gradient(x: Tensor) -> Tensor:
    return torch.empty(x.shape[-1:], dtype=x.dtype, device=x.device)


def _sums(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Statistics of the rows, and sums of groups of rows."""
    channels = x.shape[-1] if x.dim() else 0
    rows = x.numel() // channels if channels else 0
    groups = (norm_backward.groups_of(rows), 2, channels)
    stats = torch.empty((rows, 2), dtype=torch.float32, device=x.device)
    return stats, torch.empty(groups, dtype=torch.float32, device=x.device)


@launches(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda dy, x, weight, eps: (like(x), _parameter_gradient(x)),
    _sums,
)
def _rms_norm_backward(
    dy: Any, x: Any, weight: Any, dx: Any, dweight: Any, stats: Any, partials: Any, eps: float
) -> None:
    norm_backward.backward(dy, x, weight, dx, dweight, None, stats, partials, eps)


@launches(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dy, x, weight, eps: (like(x), _parameter_gradient(x), _parameter_gradient(x)),
    _sums,
)
def _layer_norm_backward(dy: Any, x: Any, weight: Any, *made: Any) -> None:
    norm_backward.backward(dy, x, weight, *made)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *_, eps = inputs
    if weight is not None and weight.dtype != x.dtype:
        raise InputError(
            f"x is {x.dtype} and weight {weight.dtype}, of which there is no gradient",
            where="gpt2cupy.torch: norm",
            remedy="Give both in one dtype, or call it under torch.no_grad().",
        )
    ctx.save_for_backward(x, weight)
    ctx.eps = eps


# The gradient that autograd hands over may have any strides, a sum's even 0: it is copied then.
def _rms_norm_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight = _rms_norm_backward(dy.contiguous(), x, weight, ctx.eps)
    return dx, None if weight is None else dweight, None


def _layer_norm_gradient(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    dx, dweight, dbias = _layer_norm_backward(dy.contiguous(), x, weight, ctx.eps)
    bias = dbias if ctx.needs_input_grad[2] else None
    return dx, None if weight is None else dweight, bias, None


for _name, _gradient in (("rms_norm", _rms_norm_gradient), ("layer_norm", _layer_norm_gradient)):
    torch.library.register_autograd(
        f"gpt2cupy::{_name}", _gradient, setup_context=_keep, lib=LIBRARY
    )


@refuses_types
def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """:func:`gpt2cupy.ops.rms_norm` of tensors; differentiable."""
    return _rms_norm(x, weight, eps)


@refuses_types
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """:func:`gpt2cupy.ops.layer_norm` of tensors; differentiable."""
    return _layer_norm(x, weight, bias, eps)


@refuses_types
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gpt2cupy.ops.add_rms_norm` of tensors; has no gradient."""
    refuse_gradient("add_rms_norm", x, residual, weight)
    return _add_rms_norm(x, residual, weight, eps)


@refuses_types
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`gpt2cupy.ops.add_layer_norm` of tensors; has no gradient."""
    refuse_gradient("add_layer_norm", x, residual, weight, bias)
    return _add_layer_norm(x, residual, weight, bias, eps)
