"""The biases of a norm and of the product after it as one, made before there is an input."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..quantize import QuantizedMatrix
from .core.launch import device_empty, is_device_array
from .core.registry import Cost, moved, op, written
from .linear import gemv
from .linear_kernels import takes_norm_once

Array = Any


def takes_shift(weight: Array | QuantizedMatrix, backend: str = "ours") -> bool:
    """Whether :func:`gpt2cupy.ops.norm_linear` makes use of a ``shift`` for one row."""
    return is_device_array(weight) and takes_norm_once(weight, backend)


def _cost(norm_bias: Array, weight: Array, bias: Array | None, out: Array | None) -> Cost:
    """A GEMV."""
    m, k = weight.shape
    return Cost(moved(norm_bias, weight, bias) + written(out, m, np.float32), 2 * m * k)


@op(
    reference="reference.shifted_bias",
    cost=_cost,
    takes="norm_bias: real[K], weight: @norm_bias[M,K], bias: real[M]?, out: float32|float64[M]!",
    of_models=True,
)
def shifted_bias(
    norm_bias: Array, weight: Array, bias: Array | None = None, *, out: Array | None = None
) -> Array:
    """``weight @ norm_bias + bias``: what both biases of :func:`gpt2cupy.ops.norm_linear` come to.

    Parameters
    ----------
    norm_bias : array [K]
    weight : array [M, K]
        Of norm_bias's dtype.
    bias : array [M], optional
        Of any dtype.
    out : array of float32 [M], optional

    Returns
    -------
    array [M]
        Float32; on NumPy of float64's precision where norm_bias has it.

    Raises
    ------
    InputError
        On the GPU, for a wrong dtype, shape or layout.
    """
    if out is None:
        out = device_empty((len(weight),), np.float32)
    gemv(norm_bias[None], weight, None if bias is None else _float32(bias), out=out[None])
    return out


def _float32(array: Array) -> Array:
    """A copy through the host: a kernel of CuPy would have to be compiled first."""
    import cupy

    return cupy.asarray(array.get().astype(np.float32))
