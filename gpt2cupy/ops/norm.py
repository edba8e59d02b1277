"""Layer norm, alone and with the residual addition before it. Kernels: cuda_src/norm.cu."""

from __future__ import annotations

from typing import Any

from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_WARPS = 4  # rows of a block

_LAYER_NORM = "x: float32[N,C], weight: ELEM[C], bias: ELEM[C], out: ELEM[N,C], eps: float, N, C"
LAYER_NORM = Kernel("norm.cu", "layer_norm", _LAYER_NORM, overlaps=True)
LAYER_NORM_NAIVE = Kernel("norm.cu", "layer_norm_naive", _LAYER_NORM)
ADD_LAYER_NORM = Kernel(
    "norm.cu",
    "add_layer_norm",
    "x: ELEM[N,C], residual: float32[N,C], weight: ELEM[C], bias: ELEM[C], out: ELEM[N,C], "
    "eps: float, N, C",
    overlaps=True,
)


def _grid(rows: int) -> tuple[int, ...]:
    return (-(-rows // _WARPS),)


def _norm_cost(x: Array, weight: Array, bias: Array, out: Array | None) -> Cost:
    """Mean (1), variance (3), normalise (2), weight and bias (2): 8 per value."""
    return Cost(moved(x, weight, bias) + written(out, x.size, weight.dtype), 8 * x.size)


def _add_norm_cost(
    x: Array, residual: Array, weight: Array, bias: Array, out: Array | None
) -> Cost:
    """Layer norm of the sum, which is written too."""
    norm = _norm_cost(residual, weight, bias, out)
    return Cost(norm.bytes + moved(x, residual), norm.flops + x.size)


@op(reference="reference.layer_norm", cost=_norm_cost)
def layer_norm(
    x: Array, weight: Array, bias: Array, eps: float = 1e-5, *, out: Array | None = None
) -> Array:
    """Normalise each row: ``(x - mean) / sqrt(var + eps) * weight + bias``.

    Parameters
    ----------
    x : array [N, C]
        The residual stream; float32 on the GPU.
    weight, bias : array [C]
    eps : float
        Added to the variance, which divides by C.
    out : array [N, C], optional
        Of weight's dtype.

    Returns
    -------
    array [N, C]
        Of weight's dtype; sums are kept in float32.

    Raises
    ------
    InputError
        On the GPU, for a wrong dtype, shape or layout.

    Notes
    -----
    Ba, Kiros, Hinton, "Layer Normalization", 2016.
    """
    if out is None:
        out = device_empty(x.shape, weight.dtype)
    launch(
        LAYER_NORM, _grid(len(x)), (32 * _WARPS,), (x, weight, bias, out, eps), elem=weight.dtype
    )
    return out


@op(reference="reference.add_layer_norm", cost=_add_norm_cost)
def add_layer_norm(
    x: Array,
    residual: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Array:
    """``residual += x`` in place, then the layer norm of ``residual``.

    Parameters
    ----------
    x : array [N, C]
        Of weight's dtype.
    residual : array [N, C]
        float32 on the GPU; updated in place.
    weight, bias : array [C]
    eps : float
    out : array [N, C], optional
        Of weight's dtype.

    Returns
    -------
    array [N, C]
        Of weight's dtype.

    Raises
    ------
    InputError
        On the GPU, for a wrong dtype, shape or layout.
    """
    if out is None:
        out = device_empty(x.shape, weight.dtype)
    args = (x, residual, weight, bias, out, eps)
    launch(ADD_LAYER_NORM, _grid(len(x)), (32 * _WARPS,), args, elem=weight.dtype)
    return out
