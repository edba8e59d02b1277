"""The error rule of gpt2cupy.validate, as an assertion."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from gpt2cupy.validate.rule import Limit, errors, one_ulp

__all__ = ["DTYPES", "check", "errors", "one_ulp"]

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


def check(
    ours: np.ndarray, baseline: np.ndarray, reference: np.ndarray, dtype: np.dtype, what: str = ""
) -> None:
    """Assert the rule for the largest and the RMS error, printing both sides."""
    limit = Limit.of(baseline, reference, dtype)
    largest, rms = errors(ours, reference)
    for name, own, base in (
        ("max", largest, limit.baseline_max),
        ("rms", rms, limit.baseline_rms),
    ):
        print(
            f"{what} {dtype.name} {name}: ours {own:.3e}, baseline {base:.3e}, ulp {limit.ulp:.3e}"
        )
    assert limit.admits(largest, rms), f"{what} {dtype.name}: {largest}, {rms} over {limit}"
