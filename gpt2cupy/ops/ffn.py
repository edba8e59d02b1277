"""The feed-forward network of a transformer layer: two products and what is between them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..errors import InputError
from .core.launch import device_empty, is_device_array
from .core.registry import Cost, moved, op, written
from .epilogue import ACTIVATION_CODES
from .ffn_few import Sizes, fits, launch_few, parts
from .linear import as_rows, linear

Array = Any


def _cost(
    x: Array,
    w1: Array,
    b1: Array | None,
    w2: Array,
    b2: Array | None,
    residual: Array | None,
    out: Array | None,
) -> Cost:
    """Both products, 2 N F (C + M); the intermediate is not counted."""
    rows, outputs = math.prod(x.shape[:-1]), len(w2)
    size = written(out, rows * outputs, (x if residual is None else residual).dtype)
    operations = 2 * rows * len(w1) * (w1.shape[1] + outputs)
    return Cost(moved(x, w1, b1, w2, b2, residual) + size, operations)


@op(
    reference="reference.ffn",
    cost=_cost,
    takes="x: real[*N,C], w1: @x[F,C], b1: @x[F]?, w2: @x[M,F], b2: @out,residual,x[M]?, "
    "activation: gelu_tanh|gelu_erf|relu|silu|tanh, residual: @x|float32[*N,M]?, "
    "out: @residual;@x|float32[*N,M]!residual, scratch: any, backend: products|fused",
    only_launches=True,
)
def ffn(
    x: Array,
    w1: Array,
    b1: Array | None,
    w2: Array,
    b2: Array | None,
    *,
    activation: str = "gelu_tanh",
    residual: Array | None = None,
    out: Array | None = None,
    scratch: Array | None = None,
    backend: str = "products",
) -> Array:
    """``activation(x @ w1.T + b1) @ w2.T + b2 + residual``.

    Two products: the activation is in the epilogue of the first, and what comes before it is not
    stored.

    Parameters
    ----------
    x : array [..., C]
        Contiguous; leading dimensions are any, N rows in all.
    w1 : array [F, C]
        Of x's dtype, a row for each hidden value.
    b1 : array [F] or None
        Of x's dtype.
    w2 : array [M, F]
        Of x's dtype.
    b2 : array [M] or None
        Of out's dtype.
    activation : {"gelu_tanh", "gelu_erf", "relu", "silu", "tanh"}
    residual : array [..., M], optional
        Of out's dtype; may be ``out``.
    out : array [..., M], optional
        Of x's dtype, or float32; shares no memory with an input but the residual. On a GPU that is
        checked against what the second product reads, and not against x, w1 and b1.
    scratch : array, optional
        Of the shape and dtype that :func:`ffn_scratch` says; without it memory is allocated.
    backend : {"products", "fused"}
        On the GPU "products" is two calls of :func:`linear`. With "fused" one kernel makes both
        products of up to 16 rows of fp16 or bf16 and keeps the hidden values in shared memory; a
        second adds the partial sums of its clusters (ffn_few.cu, sm_80 and newer). It stores no
        hidden values, and was the slower of the two wherever it was measured.

    Returns
    -------
    array [..., M]
        Of residual's dtype, else of x's, unless ``out`` says otherwise; sums are kept in
        float32, the hidden values are rounded to x's dtype.

    Raises
    ------
    InputError
        As :func:`linear`; with "fused" on the GPU also where that kernel is not there: for more
        rows, for sizes that are no multiples of 8, rows of w1 below 1 KiB, and where rows do not
        fit into shared memory.

    Notes
    -----
    Vaswani et al., "Attention Is All You Need", 2017, section 3.3.
    """
    shape = (*x.shape[:-1], len(w2))
    if out is None:
        out = device_empty(shape, (x if residual is None else residual).dtype)
    rows, target, added = x, out, residual
    if x.ndim != 2:
        rows, target = as_rows(x, "x", x.shape, "ffn"), as_rows(out, "out", shape, "ffn")
        added = None if residual is None else as_rows(residual, "residual", shape, "ffn")
    sizes = w1.shape[1], len(w1), len(w2)
    fused = _takes_fused(len(rows), sizes, x.dtype, backend)
    if scratch is None:
        scratch = device_empty(*_scratch(len(rows), sizes, x.dtype, fused))
    if fused:
        code = ACTIVATION_CODES[activation]
        launch_few((rows, w1, b1), w2, b2, added, target, scratch, code)
    else:
        linear(rows, w1, b1, activation=activation, out=scratch)
        linear(scratch, w2, b2, residual=added, out=target)
    return out


def _takes_fused(rows: int, sizes: Sizes, dtype: Any, backend: str) -> bool:
    """Whether one kernel makes both products."""
    if backend == "fused" and not fits(rows, sizes, dtype):
        raise InputError(
            f"no fused kernel takes {rows} rows of {np.dtype(dtype).name}, {sizes[0]} -> "
            f"{sizes[1]} -> {sizes[2]}",
            where="ffn: backend",
            remedy="Leave backend='fused' out.",
        )
    return backend == "fused"


def ffn_scratch(
    x: Array, w1: Array, w2: Array, backend: str = "products"
) -> tuple[tuple[int, ...], Any]:
    """Shape and dtype of the memory that :func:`ffn` needs beside its output.

    The hidden values [N, F]; of the fused kernel partial sums of the output.
    """
    sizes = w1.shape[1], len(w1), len(w2)
    return scratch_of(math.prod(x.shape[:-1]), sizes, x.dtype, backend, is_device_array(x))


def scratch_of(
    rows: int, sizes: Sizes, dtype: Any, backend: str = "products", on_device: bool = True
) -> tuple[tuple[int, ...], Any]:
    """:func:`ffn_scratch` by numbers, on the current device; sizes are C, F and M."""
    fused = on_device and _takes_fused(rows, sizes, dtype, backend)
    return _scratch(rows, sizes, dtype, fused)


def _scratch(rows: int, sizes: Sizes, dtype: Any, fused: bool) -> tuple[tuple[int, ...], Any]:
    if fused:
        return (parts(sizes[1]), rows, sizes[2]), np.dtype(np.float32)
    return (rows, sizes[1]), dtype
