"""The error rule: against float64, ours may err twice as much as the baseline, plus one ulp.

The baseline is PyTorch on the same device and dtype where it is compared with;
else the same computation with inputs rounded to the dtype, float32 sums, and the
result rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np


def one_ulp(largest: float, dtype: np.dtype) -> float:
    """Distance to the next number of the dtype at the largest reference value."""
    precision: Any = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    # NumPy's functions: a reference that is NaN gives a limit of NaN, which nothing meets.
    exponent = np.floor(np.log2(np.maximum(largest, float(precision.tiny))))
    return float(precision.eps * 2.0**exponent)


def errors(value: Any, reference: np.ndarray) -> tuple[float, float]:
    """Largest and root-mean-square difference, in float64."""
    difference = np.asarray(value, np.float64) - reference
    return float(np.abs(difference).max()), float(np.sqrt(np.mean(difference**2)))


@dataclass(frozen=True)
class Limit:
    """The largest errors that the rule admits.

    Attributes
    ----------
    baseline_max, baseline_rms : float
        Errors of the baseline against float64.
    ulp : float
        One unit in the last place of the largest reference value.
    sides : int
        1 for a result against float64; 2 for two results against each other,
        which may lie on both sides of it.
    """

    baseline_max: float
    baseline_rms: float
    ulp: float
    sides: int = 1

    @classmethod
    def of(cls, baseline: Any, exact: np.ndarray, dtype: np.dtype) -> Limit:
        """The limit for results of ``dtype``, from the baseline's and the float64 values."""
        return cls(*errors(baseline, exact), one_ulp(float(np.abs(exact).max()), dtype))

    @property
    def max(self) -> float:
        return self.sides * (2 * self.baseline_max + self.ulp)

    @property
    def rms(self) -> float:
        return self.sides * (2 * self.baseline_rms + self.ulp)

    def admits(self, largest: float, rms: float) -> bool:
        """Whether both errors are within the limit; NaN never is."""
        return largest <= self.max and rms <= self.rms
