"""GELU and the gate of SwiGLU. Kernels: cuda_src/elementwise.cu."""

from __future__ import annotations

import functools
import math
from typing import Any

from .core.launch import Kernel, device_empty, launch
from .core.registry import Cost, moved, op, written

Array = Any

_THREADS, _PIECES = 256, 2  # PIECES in elementwise.cu
_GELU = "x: ELEM[*N,C], bias: ELEM[C]?, out: ELEM[*N,C]~, N, C, x_stride, out_stride"
GELU = {
    "none": Kernel("elementwise.cu", "gelu_erf", _GELU),
    "tanh": Kernel("elementwise.cu", "gelu_tanh", _GELU),
}
SILU_MUL = Kernel(
    "elementwise.cu",
    "silu_mul",
    "gate: ELEM[*N,C], up: ELEM[*N,C], out: ELEM[*N,C]~, N, C, gate_stride, up_stride, out_stride",
)


@functools.lru_cache(4096)
def _grid(shape: tuple[int, ...], itemsize: int, contiguous: bool) -> tuple[int, ...]:
    """Blocks for all elements, which the kernel takes one by one where pieces do not fit."""
    elements = 16 // itemsize
    # What lies between the rows of a view may be no multiple of a piece.
    if not contiguous or not shape or shape[-1] % elements:
        elements = 1
    return (-(-math.prod(shape) // (elements * _THREADS * _PIECES)),)


def _gelu(x: Array, bias: Array | None, approximate: str, out: Array | None) -> Array:
    if out is None:
        out = device_empty(x.shape, x.dtype)
    launch(
        GELU[approximate],
        _grid(x.shape, x.itemsize, x._c_contiguous and out._c_contiguous),
        (_THREADS,),
        (x, bias, out),
        elem=x.dtype,
    )
    return out


def _cost(x: Array, bias: Array | None, out: Array | None) -> Cost:
    """One addition, and 8 operations beside the function of Phi."""
    return Cost(moved(x, bias) + written(out, x.size, x.dtype), 9 * x.size)


def _gelu_cost(x: Array, out: Array | None) -> Cost:
    return Cost(moved(x) + written(out, x.size, x.dtype), 8 * x.size)


def _silu_cost(gate: Array, up: Array, out: Array | None) -> Cost:
    """Negation, exponential, addition, division and product: 5 per value."""
    return Cost(moved(gate, up) + written(out, gate.size, gate.dtype), 5 * gate.size)


@op(
    reference="reference.gelu",
    cost=_gelu_cost,
    takes="x: real[*N,C], approximate: none|tanh, out: @x[*N,C]~",
    only_launches=True,
)
def gelu(x: Array, approximate: str = "none", *, out: Array | None = None) -> Array:
    """``x Phi(x)``, with Phi the normal distribution function.

    Parameters
    ----------
    x : array [..., C]
        On the GPU it may be a view whose rows lie one stride apart.
    approximate : {"none", "tanh"}
        As PyTorch names them: Phi by erf, or by
        ``(1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2``. In fp16 and bf16 that tanh is the
        hardware's approximation, whose relative error of 2^-11 is that of rounding to fp16.
    out : array [..., C], optional
        Of x's dtype; may be x.

    Returns
    -------
    array [..., C]
        Of x's dtype; computed in float32.

    Raises
    ------
    InputError
        For another ``approximate`` or dtype, and for an ``out`` that does not fit or overlaps x;
        on the GPU also for a layout, alignment or device that the kernel does not take.

    Notes
    -----
    Hendrycks, Gimpel, "Gaussian Error Linear Units", 2016.
    """
    return _gelu(x, None, approximate, out)


@op(
    reference="reference.bias_gelu",
    cost=_cost,
    takes="x: real[*N,C], bias: @x[C]?, approximate: none|tanh, out: @x[*N,C]~",
    only_launches=True,
)
def bias_gelu(
    x: Array, bias: Array | None, approximate: str = "none", *, out: Array | None = None
) -> Array:
    """:func:`gelu` of ``x + bias``.

    Parameters
    ----------
    x : array [..., C]
    bias : array [C] or None
        Of x's dtype.
    approximate : {"none", "tanh"}
    out : array [..., C], optional
        Of x's dtype; may be x.

    Returns
    -------
    array [..., C]
        Of x's dtype; computed in float32.

    Raises
    ------
    InputError
        As :func:`gelu`, and for a bias of another width or dtype.
    """
    return _gelu(x, bias, approximate, out)


@op(
    reference="reference.silu_mul",
    cost=_silu_cost,
    takes="gate: real[*N,C], up: @gate[*N,C], out: @gate[*N,C]~",
    only_launches=True,
)
def silu_mul(gate: Array, up: Array, *, out: Array | None = None) -> Array:
    """``gate / (1 + exp(-gate)) * up``: the inner activation of SwiGLU.

    Parameters
    ----------
    gate, up : array [..., C]
        Of one dtype; on the GPU each may be a view whose rows lie one stride apart: the two
        sides of one array [..., 2 C].
    out : array [..., C], optional
        Of that dtype; may be either.

    Returns
    -------
    array [..., C]
        Of that dtype; computed in float32.

    Raises
    ------
    InputError
        If the two differ in shape or dtype; else as :func:`gelu`.

    Notes
    -----
    Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if out is None:
        out = device_empty(gate.shape, gate.dtype)
    contiguous = gate._c_contiguous and up._c_contiguous and out._c_contiguous
    grid = _grid(gate.shape, gate.itemsize, contiguous)
    launch(SILU_MUL, grid, (_THREADS,), (gate, up, out), elem=gate.dtype)
    return out
