"""Windows: the pieces of a text of which a model scores one at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..config import GPT2Config
from ..errors import InputError, shown


@dataclass(frozen=True)
class Window:
    """Tokens of which some are scored.

    Attributes
    ----------
    tokens : numpy.ndarray of int32 [N]
        At most ``n_positions`` + 1.
    first : int
        The first one that is scored, 1 or more; all after it are.
    """

    tokens: np.ndarray
    first: int

    @property
    def scored(self) -> int:
        """How many."""
        return len(self.tokens) - self.first


def check_window(window: int | None, stride: int | None, config: GPT2Config) -> tuple[int, int]:
    """Window and stride with their defaults, checked: 1 <= stride <= window <= n_positions."""
    window = config.n_positions if window is None else window
    given = [window] if stride is None else [window, stride]
    integers = all(isinstance(v, int | np.integer) and not isinstance(v, bool) for v in given)
    if integers:
        stride = max(window // 2, 1) if stride is None else stride
        if 1 <= stride <= window <= config.n_positions:
            return int(window), int(stride)
    text = " with ".join(
        f"{name}={shown(value)}" for name, value in zip(("window", "stride"), given, strict=False)
    )
    raise InputError(
        f"{text} is impossible",
        where="score",
        remedy=f"They are integers, 1 <= stride <= window <= {config.n_positions}.",
    )


def windows(tokens: np.ndarray, first: int, window: int, stride: int) -> list[Window]:
    """The windows in which the tokens from ``first`` on are scored, each token in one.

    Parameters
    ----------
    tokens : numpy.ndarray of int32 [N]
    first : int
        1 or more. What stands before is context: of one that is too long the end is kept.
    window, stride : int
        Tokens of a window, and how far each moves.
    """
    last, found = len(tokens) - 1, []
    # Inputs start .. end - 1 predict the tokens start + 1 .. end.
    if first == 1 or last <= window:
        start = 0
    elif last - first < window:
        start = last - window
    else:
        start = max(first - 1 - (window - stride), 0)
    while first <= last:
        end = min(start + window, last)
        found.append(Window(tokens[start : end + 1], first - start))
        first = end + 1
        start += stride
    return found
