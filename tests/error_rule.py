"""The error rule: against float64, ours may err twice as much as the baseline, plus one ulp.

The baseline is PyTorch on the same device and dtype where it is installed; else
the same computation with inputs rounded to the dtype, float32 sums, and the
result rounded.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def one_ulp(largest: float, dtype: np.dtype) -> float:
    """Distance to the next number of the dtype at the largest reference value."""
    precision = ml_dtypes.finfo(dtype)
    return float(precision.eps) * 2.0 ** np.floor(np.log2(max(largest, float(precision.tiny))))


def errors(value: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Largest and root-mean-square difference, in float64."""
    difference = np.asarray(value, np.float64) - reference
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)))


def check(
    ours: np.ndarray, baseline: np.ndarray, reference: np.ndarray, dtype: np.dtype, what: str = ""
) -> None:
    """Assert the rule for the largest and the RMS error, printing both sides."""
    ulp = one_ulp(float(np.abs(reference).max()), dtype)
    for name, own, base in zip(
        ("max", "rms"), errors(ours, reference), errors(baseline, reference), strict=True
    ):
        print(f"{what} {dtype.name} {name}: ours {own:.3e}, baseline {base:.3e}, ulp {ulp:.3e}")
        assert own <= 2 * base + ulp, f"{what} {dtype.name}: {name} error {own} over the rule"
