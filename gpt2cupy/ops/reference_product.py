"""``x @ weight.T`` on NumPy arrays: for one row, for a few, and for many."""

from __future__ import annotations

import functools
import itertools
import os
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import numpy as np

Array = Any

# Inputs of a GEMM that BLAS sums at a time. It may keep one running sum over all of them
# (OpenBLAS does, MKL does not); summing parts apart brings the rounding error down by a third.
PART: ContextVar[int] = ContextVar("PART", default=128)
# A BLAS copies matrices to where it reads them faster, unless they are small. With few rows of x
# that takes longer than the product. OpenBLAS multiplies matrices of so few multiplications as
# they lie, in one thread; so the weights are given to it as a stack of those, a strip a thread.
_SMALL = 2**18
_LEAST = 4  # outputs of a small matrix for which that pays
_VECTOR = 16  # outputs that a register of AVX-512 holds
_MOST_ROWS = 16  # of x


def product(x: Array, weight: Array, *, invariant: bool = False) -> Array:
    """``x @ weight.T``.

    Parameters
    ----------
    x : ndarray [N, K]
    weight : ndarray [M, K]
    invariant : bool
        Whether a row of the result must not depend on the number of rows.

    Returns
    -------
    ndarray [N, M]
    """
    if len(x) == 1:
        # The GEMV streams the rows as they lie, in many sums at once.
        return (weight @ x[0])[None]
    if invariant:
        return np.stack([weight @ row for row in x])
    part, outputs = PART.get(), _outputs_of_small(*x.shape)
    if part < x.shape[1] and len(weight) and outputs >= _LEAST:
        return _few_rows(x, weight, outputs)
    y = x[:, :part] @ weight[:, :part].T
    for start in range(part, x.shape[1], part):
        y += x[:, start : start + part] @ weight[:, start : start + part].T
    return y


def _outputs_of_small(rows: int, size: int) -> int:
    """Outputs of a matrix that is small with so many rows of x; none where there are many."""
    if not 1 < rows <= _MOST_ROWS or not size:
        return 0
    outputs = _SMALL // (rows * size)
    return outputs // _VECTOR * _VECTOR or outputs


def _few_rows(x: Array, weight: Array, outputs: int) -> Array:
    """The product by stacks of small matrices."""
    y = np.empty((len(x), len(weight)), np.result_type(x, weight))
    matrices = -(-len(weight) // outputs)
    # The same small matrices whatever the number of threads: so are the bits.
    bounds = [matrices * each // threads() * outputs for each in range(threads() + 1)]
    strips = [(a, min(b, len(weight))) for a, b in itertools.pairwise(bounds) if a < b]
    # A thread has settings of its own for what overflows.
    settings = np.geterr()
    others = [
        _pool().submit(_strip, x, weight, y, *strip, outputs, settings) for strip in strips[1:]
    ]
    try:
        _strip(x, weight, y, *strips[0], outputs, settings)
    finally:
        for each in others:
            each.result()
    return y


def _strip(
    x: Array, weight: Array, y: Array, start: int, end: int, outputs: int, settings: Any
) -> None:
    """Outputs from start to end, so many at a time and then the rest; NumPy runs the stack in C."""
    count = (end - start) // outputs
    whole = start + count * outputs
    with np.errstate(**settings):
        if count:
            stack = weight[start:whole].reshape(count, outputs, -1).transpose(0, 2, 1)
            strides = (outputs * y.strides[1], *y.strides)
            places = np.lib.stride_tricks.as_strided(
                y[:, start:whole], (count, len(x), outputs), strides
            )
            np.matmul(x, stack, out=places)
        if whole < end:
            np.matmul(x, weight[whole:end].T, out=y[:, whole:end])


@functools.cache
def threads() -> int:
    """Threads of a product: what the variables for BLAS say, else one for each core."""
    cores = len(os.sched_getaffinity(0))
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        if (given := os.environ.get(name, "")).isdecimal() and int(given):
            return min(int(given), cores)
    return cores


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(threads() - 1, 1), "gpt2cupy-product")


# The child of a fork has none of its parent's threads.
os.register_at_fork(after_in_child=_pool.cache_clear)
