"""``linear`` and ``ffn`` of tensors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.core import blas
from .launches import launches
from .operators import refuse_gradient, refuses_types


def _rows(x: Tensor) -> int:
    return math.prod(x.shape[:-1])


def _outputs(x: Tensor, weight: Tensor, residual: Tensor | None) -> Tensor:
    like = x if residual is None else residual
    return torch.empty((*x.shape[:-1], len(weight)), dtype=like.dtype, device=x.device)


def _memory(x: Tensor, *rest: Any) -> Tensor:
    """What cuBLASLt works in: from PyTorch, whose graphs keep it. One row never needs it."""
    size = 0 if _rows(x) == 1 else blas.WORKSPACE
    return torch.empty(size, dtype=torch.uint8, device=x.device)


@launches(
    "linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, str? activation) -> Tensor",
    lambda x, weight, bias, residual, activation: _outputs(x, weight, residual),
    lambda *args: (_memory(*args),),
)
def _linear(
    x: Any, w: Any, b: Any, residual: Any, out: Any, memory: Any, activation: str | None
) -> None:
    with blas.working_in(memory):
        ops.linear(x, w, b, activation=activation, residual=residual, out=out)


def _ffn_scratch(x: Tensor, w1: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """The hidden values, and what cuBLASLt works in."""
    hidden = len(w1) if w1.dim() else 0  # of which the op says what is wrong
    return torch.empty((_rows(x), hidden), dtype=x.dtype, device=x.device), _memory(x)


@launches(
    "ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor? residual, "
    "str activation) -> Tensor",
    lambda x, w1, b1, w2, b2, residual, activation: _outputs(x, w2, residual),
    _ffn_scratch,
)
def _ffn(
    x: Any, w1: Any, b1: Any, w2: Any, b2: Any, residual: Any, out: Any, scratch: Any,
    memory: Any, activation: str,
) -> None:  # fmt: skip
    given: Any = {"activation": activation, "residual": residual, "out": out}
    with blas.working_in(memory):
        ops.ffn(x, w1, b1, w2, b2, **given, scratch=scratch)


@refuses_types
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`gpt2cupy.ops.linear` of tensors; has no gradient."""
    refuse_gradient("linear", x, weight, bias, residual)
    return _linear(x, weight, bias, residual, activation)


@refuses_types
def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`gpt2cupy.ops.ffn` of tensors; has no gradient."""
    refuse_gradient("ffn", x, w1, b1, w2, b2, residual)
    return _ffn(x, w1, b1, w2, b2, residual, activation)
