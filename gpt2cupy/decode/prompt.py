"""Running prompts: launch by launch, or from a graph per length bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..cache import KVCache
from ..model import GPT2
from ..ops.tape import recorded
from ..workspace import PackedPrompts, Workspace
from .graph import captured

# Tokens of a graph; a prompt takes the next larger one, at most half as many again.
BUCKETS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


class PromptRunner:
    """Extends cache slots by packed new tokens.

    Parameters
    ----------
    model : GPT2
    cache : KVCache
    work : Workspace
        As many rows as are run at once.
    graphs : bool
        Whether to replay graphs on the GPU: each bucket is captured when it is first
        needed, and then costs one launch instead of about ninety.
    """

    def __init__(
        self, model: GPT2, cache: KVCache, work: Workspace, *, graphs: bool = True
    ) -> None:
        self.model = model
        self.cache = cache
        self.work = work
        # What follows dequantises in the memory of ``work``.
        rows = self._sequences(cache.slots)
        self._last = Workspace(model.config, rows, model.dtype, model.xp)
        self._graphs = graphs and model.xp is not np
        # By rows and backend: the input, what must live as long as the graph, the graph, its
        # output.
        self._buckets: dict[
            tuple[int, str], tuple[PackedPrompts, Any, Callable[[], None], Any]
        ] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of its activations."""
        return self.work.nbytes + self._last.nbytes

    def run(self, tokens: Sequence[np.ndarray], slots: Sequence[int]) -> Any:
        """Extend slots by new tokens.

        Parameters
        ----------
        tokens, slots
            As in :meth:`GPT2.prefill`.

        Returns
        -------
        array [R, C]
            Residual stream of each sequence's last token; rows past the last sequence hold
            nothing of use.
        """
        total = sum(len(t) for t in tokens)
        rows = next((n for n in BUCKETS if n >= total), 0)
        if not self._graphs or not rows or rows > self.work.rows:
            packed = PackedPrompts(total, self._sequences(len(tokens)), self.model.xp)
            packed.fill(tokens, slots, self.cache)
            return self._queue(packed, max(len(t) for t in tokens))
        key = rows, self.model.backend
        if key not in self._buckets:
            self._buckets[key] = self._capture(rows)
        packed, _, launch, x = self._buckets[key]
        packed.fill(tokens, slots, self.cache)
        launch()
        return x

    def _sequences(self, count: int) -> int:
        # BLAS sums a product of one row in another order than one of several: on NumPy a single
        # sequence has an empty neighbour, as single rows have in a step.
        return max(count, 2) if self.model.xp is np else count

    def _queue(self, packed: PackedPrompts, longest: int) -> Any:
        work, last = self.work.first(packed.rows), self._last.first(len(packed.slots))
        return self.model.run_packed(packed, longest, self.cache, work, last=last)

    def _capture(self, rows: int) -> tuple[PackedPrompts, Any, Callable[[], None], Any]:
        packed = PackedPrompts(rows, min(rows, self.cache.slots), self.model.xp)
        with recorded() as calls:
            x = self._queue(packed, rows)
        return packed, calls, captured(calls), x
