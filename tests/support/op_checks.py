"""Values and comparisons of the tests of ops."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from error_rule import check

from gpt2cupy.quantize import QuantizedMatrix

SEEDS = range(5)


def draw(rng, shape, dtype=np.float32, scale=1.0):
    """Random values already rounded to the dtype, so that rounding inputs is no error."""
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(dtype)


def wide(*arrays):
    """Each in float64."""
    return [None if a is None else a.astype(np.float64) for a in arrays]


def on(xp, *arrays):
    """Each as an array of NumPy or CuPy."""

    def placed(array: Any) -> Any:
        if isinstance(array, QuantizedMatrix):
            return QuantizedMatrix(xp.asarray(array.values), xp.asarray(array.scales))
        return None if array is None else xp.asarray(array)

    return [placed(array) for array in arrays]


def check_together(found, dtype, what):
    """The rule over (ours, baseline, exact) of several seeds: one value can be right by luck."""
    columns = [np.concatenate([np.ravel(a) for a in c]) for c in zip(*found, strict=True)]
    check(*columns, dtype, what)


def torch_with_gpu():
    """PyTorch if it is installed with CUDA, else None.

    None too where GPT2CUPY_TEST_TORCH=0: a sanitizer would look at its kernels as at ours.
    """
    if os.environ.get("GPT2CUPY_TEST_TORCH") == "0":
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None
