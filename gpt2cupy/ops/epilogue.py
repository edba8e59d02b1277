"""What follows a product: bias, activation, residual. Kernel: cuda_src/linear.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from .core.launch import device_empty, launch
from .core.registry import Cost, moved, op, written
from .linear_kernels import BIAS_ACT, THREADS

Array = Any

ACTIVATION_CODES = {None: 0, "gelu_tanh": 1, "gelu_erf": 2, "relu": 3, "silu": 4, "tanh": 5}


def _epilogue_cost(
    x: Array,
    bias: Array | None,
    activation: str | None,
    residual: Array | None,
    out: Array | None,
) -> Cost:
    """An addition per bias and residual, and one operation per activated value."""
    parts = sum(each is not None for each in (bias, residual, activation))
    return Cost(moved(x, bias, residual) + written(out, x.size, x.dtype), parts * x.size)


@op(
    reference="reference.bias_act",
    cost=_epilogue_cost,
    takes="x: real[N,M], bias: real[M]?, activation: gelu_tanh|gelu_erf|relu|silu|tanh?, "
    "residual: real[N,M]?, out: real[N,M]~",
    of_models=True,
)
def bias_act(
    x: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Array:
    """``activation(x + bias) + residual``, elementwise over [N, M].

    Parameters
    ----------
    x : array [N, M]
    bias : array [M], optional
    activation : {None, "gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    residual : array [N, M], optional
    out : array [N, M], optional
        May be x or residual. On the GPU all of them have one dtype.

    Returns
    -------
    array [N, M]
    """
    if out is None:
        out = device_empty(x.shape, x.dtype)
    blocks = min(-(-x.size // THREADS), 4096)
    args = (x, bias, residual, out, ACTIVATION_CODES[activation])
    launch(BIAS_ACT[x.dtype == np.float32], (blocks,), (THREADS,), args, elem=x.dtype)
    return out
