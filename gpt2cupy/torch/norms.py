"""Layer norm and RMS norm of tensors, with their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..ops import norm_backward
from .launches import run
from .operators import LIBRARY, like, operator, refuse_gradient


@operator(
    "rms_norm(Tensor x, Tensor? weight, float eps) -> Tensor",
    lambda x, weight, eps: like(x, weight),
)
def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    out = like(x, weight)
    run("rms_norm", lambda x, w, out, eps: ops.rms_norm(x, w, eps, out=out), (x, weight, out), eps)
    return out


@operator(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    lambda x, weight, bias, eps: like(x, weight),
)
def _layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    def call(x: Any, w: Any, b: Any, out: Any, eps: float) -> None:
        ops.layer_norm(x, w, b, eps, out=out)

    out = like(x, weight)
    run("layer_norm", call, (x, weight, bias, out), eps)
    return out


@operator(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda x, residual, weight, eps: (like(x, weight), like(residual)),
)
def _add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    def call(x: Any, residual: Any, w: Any, y: Any, total: Any, eps: float) -> None:
        ops.add_rms_norm(x, residual, w, eps, out=(y, total))

    y, total = like(x, weight), like(residual)
    run("add_rms_norm", call, (x, residual, weight, y, total), eps)
    return y, total


@operator(
    "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)",
    lambda x, residual, weight, bias, eps: (like(x, weight), like(residual)),
)
def _add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    def call(x: Any, residual: Any, w: Any, b: Any, y: Any, total: Any, eps: float) -> None:
        ops.add_layer_norm(x, residual, w, b, eps, out=(y, total))

    y, total = like(x, weight), like(residual)
    run("add_layer_norm", call, (x, residual, weight, bias, y, total), eps)
    return y, total


def _parameter_gradient(x: Tensor) -> Tensor:
    return torch.empty(x.shape[-1:], dtype=x.dtype, device=x.device)


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, centred: bool) -> Any:
    channels = x.shape[-1] if x.dim() else 0
    rows = x.numel() // channels if channels else 0
    dx, dweight = like(x), _parameter_gradient(x)
    dbias = _parameter_gradient(x) if centred else None
    stats = torch.empty((rows, 2), dtype=torch.float32, device=x.device)
    groups = (norm_backward.groups_of(rows), 2, channels)
    partials = torch.empty(groups, dtype=torch.float32, device=x.device)
    tensors = (dy, x, weight, dx, dweight, dbias, stats, partials)
    run("norm_backward", norm_backward.backward, tensors, eps)
    return (dx, dweight, dbias) if centred else (dx, dweight)


@operator(
    "rms_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
    lambda dy, x, weight, eps: (like(x), _parameter_gradient(x)),
)
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _norm_backward(dy, x, weight, eps, False)


@operator(
    "layer_norm_backward(Tensor dy, Tensor x, Tensor? weight, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    lambda dy, x, weight, eps: (like(x), _parameter_gradient(x), _parameter_gradient(x)),
)
def _layer_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm_backward(dy, x, weight, eps, True)


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


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """:func:`gpt2cupy.ops.rms_norm` of tensors; differentiable."""
    return _rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """:func:`gpt2cupy.ops.layer_norm` of tensors; differentiable."""
    return _layer_norm(x, weight, bias, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """:func:`gpt2cupy.ops.add_rms_norm` of tensors; has no gradient."""
    refuse_gradient("add_rms_norm", x, residual, weight)
    return _add_rms_norm(x, residual, weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """:func:`gpt2cupy.ops.add_layer_norm` of tensors; has no gradient."""
    refuse_gradient("add_layer_norm", x, residual, weight, bias)
    return _add_layer_norm(x, residual, weight, bias, eps)
