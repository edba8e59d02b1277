"""The feed-forward network of a transformer layer: two products and what is between them."""

from __future__ import annotations

import math
from typing import Any

from .core.launch import device_empty
from .core.registry import Cost, moved, op, written
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
    "out: @residual;@x|float32[*N,M]!residual, scratch: any",
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
    scratch : array [N, F], optional
        Of x's dtype: where the hidden values go; without it memory is allocated.

    Returns
    -------
    array [..., M]
        Of residual's dtype, else of x's, unless ``out`` says otherwise; sums are kept in
        float32, the hidden values are rounded to x's dtype.

    Raises
    ------
    InputError
        As :func:`linear`.

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
    if scratch is None:
        scratch = device_empty((len(rows), len(w1)), x.dtype)
    linear(rows, w1, b1, activation=activation, out=scratch)
    linear(scratch, w2, b2, residual=added, out=target)
    return out
