"""When each launch of each step ran, and what it adds to its step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def middle_half(times: np.ndarray) -> np.ndarray:
    """Which of the times [S] are the middle half."""
    order = np.argsort(times, kind="stable")
    quarter = len(order) // 4
    return order[quarter : len(order) - quarter]


@dataclass
class Timeline:
    """When each launch (on NumPy: each op) of each step began and ended, in microseconds.

    Attributes
    ----------
    start, end : array of float64 [S, n]
        S steps of n launches, on one clock within a run.
    owner : list of (int, int)
        The op that each belongs to, and the launch of that op.
    names : list of str
    source : {"perf_counter", "events", "cupti"}
    step_us : float
        Time of a step while it was measured so. Of recorded kernels the mean of the middle half
        of the steps, between the events of the unprofiled ones; else the median, and where ops
        are timed by events the mean, by the wall clock.
    """

    start: np.ndarray
    end: np.ndarray
    owner: list[tuple[int, int]]
    names: list[str]
    source: str
    step_us: float

    @property
    def busy(self) -> np.ndarray:
        """Duration of each launch [S, n]."""
        return self.end - self.start

    def parts(self, tokens: int) -> Parts:
        """The steps as launches that follow one another, although some overlap.

        Parameters
        ----------
        tokens : int
            Steps of a run. Its first step is left out: it follows no other.
        """
        n = len(self.names)
        start, end = (times.reshape(-1, tokens * n) for times in (self.start, self.end))
        # A kernel that ends before an earlier one adds nothing.
        end = np.maximum.accumulate(end, axis=1)
        before, start, end = end[:, n - 1 : -1], start[:, n:], end[:, n:]
        gaps = np.maximum(start - before, 0)
        alone = end - np.maximum(start, before)
        busy = self.busy.reshape(-1, tokens, n)[:, 1:].reshape(-1, n)
        return Parts(busy, np.maximum(alone, 0).reshape(-1, n), gaps.reshape(-1, n)).middle()


@dataclass
class Parts:
    """Each launch of each step [S, n], in microseconds.

    Attributes
    ----------
    busy : array of float64
        How long it ran.
    alone : array of float64
        What of that came after the end of the launch before.
    gaps : array of float64
        How long nothing ran ahead of it.
    """

    busy: np.ndarray
    alone: np.ndarray
    gaps: np.ndarray

    @property
    def added(self) -> np.ndarray:
        """From the end of the launch before to its own end; these make the step."""
        return self.gaps + self.alone

    def middle(self) -> Parts:
        """The middle half of the steps by their time: their means add up, as medians do not."""
        kept = middle_half(self.added.sum(axis=1))
        return Parts(self.busy[kept], self.alone[kept], self.gaps[kept])
