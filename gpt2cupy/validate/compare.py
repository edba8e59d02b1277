"""Two sets of logits compared step by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .rule import Limit

TOP = 3  # most probable tokens kept of both sides


@dataclass(frozen=True)
class Step:
    """One position of one row.

    Attributes
    ----------
    step, row : int
        Step from 0, and row of the batch.
    max_abs, rmse : float
        Largest and root-mean-square difference of the logits.
    kl : float
        Kullback-Leibler divergence of ours from the reference's distribution, in nats.
    top, reference_top : tuple of (int, float)
        The most probable tokens with their logits, the best first.
    agrees : bool
        Whether both choose the same token.
    """

    step: int
    row: int
    max_abs: float
    rmse: float
    kl: float
    top: tuple[tuple[int, float], ...]
    reference_top: tuple[tuple[int, float], ...]

    @property
    def agrees(self) -> bool:
        return self.top[0][0] == self.reference_top[0][0]


@dataclass(frozen=True)
class Comparison:
    """What differs between two ways to the same values, and whether the rule admits it.

    Attributes
    ----------
    dtype : str
    ours, against : str
        The two ways.
    max_abs, rmse : float
        Over everything compared.
    limit : Limit
    steps : tuple of Step
        Empty where hidden states are compared.
    """

    dtype: str
    ours: str
    against: str
    max_abs: float
    rmse: float
    limit: Limit
    steps: tuple[Step, ...] = ()

    @property
    def passed(self) -> bool:
        return self.limit.admits(self.max_abs, self.rmse)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; values that are not finite become None."""
        limit = asdict(self.limit) | {"max": self.limit.max, "rms": self.limit.rms}
        steps = [asdict(step) | {"agrees": step.agrees} for step in self.steps]
        own = {
            "dtype": self.dtype,
            "ours": self.ours,
            "against": self.against,
            "max_abs": self.max_abs,
            "rmse": self.rmse,
            "passed": self.passed,
            "limit": limit,
            "steps": steps,
        }
        return _finite(own)


def compare_logits(
    dtype: str, ours: str, against: str, values: np.ndarray, reference: np.ndarray, limit: Limit
) -> Comparison:
    """Compare logits [B, T, V] with reference logits of the same shape."""
    rows, length = values.shape[:2]
    steps = [
        _step(step, row, values[row, step], reference[row, step])
        for step in range(length)
        for row in range(rows)
    ]
    largest = float(np.max([step.max_abs for step in steps]))
    squares = [step.rmse**2 for step in steps]
    rmse = math.sqrt(float(np.mean(squares)))
    return Comparison(dtype, ours, against, largest, rmse, limit, tuple(steps))


def _step(step: int, row: int, ours: np.ndarray, reference: np.ndarray) -> Step:
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    # NaN and inf are results here: they must come out of the comparison as a failure.
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        difference = ours - reference
        largest = float(np.abs(difference).max())
        rmse = float(np.sqrt(np.mean(difference**2)))
        log_p, log_q = _log_softmax(reference), _log_softmax(ours)
        p = np.exp(log_p)
        kl = float(np.sum(np.where(p > 0, p * (log_p - log_q), 0.0)))
    return Step(step, row, largest, rmse, max(kl, 0.0), top(ours), top(reference))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def top(logits: np.ndarray, count: int = TOP) -> tuple[tuple[int, float], ...]:
    """The largest logits [V] as (token id, logit), the largest first, ties by id."""
    count = min(count, len(logits))
    # Of the negatives, so that NaN comes last; equal values in the order of their ids.
    best = np.sort(np.argpartition(-logits, count - 1)[:count])
    order = best[np.argsort(-logits[best], kind="stable")]
    return tuple((int(i), float(logits[i])) for i in order)


def worst(steps: Sequence[Step]) -> Step:
    """The step with the largest difference; NaN is larger than any number."""
    return max(steps, key=lambda step: (math.isnan(step.max_abs), step.max_abs))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
