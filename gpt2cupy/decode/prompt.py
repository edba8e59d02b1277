"""Running prompts: launch by launch, or from a graph per length bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..cache import KVCache
from ..model import GPT2
from ..ops.core.tape import recorded
from ..ops.quantized import scratch_size
from ..workspace import PackedPrompts, Workspace
from .graph import captured
from .state import DecodeState
from .step import sample_next

# Tokens of a graph; a prompt takes the next larger one, at most half as many again.
BUCKETS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass
class _Bucket:
    """The graph for prompts of up to so many tokens."""

    packed: PackedPrompts  # its input
    kept: Any  # what must live as long as it
    calls: list[Callable[[], Any]]  # its launches
    x: Any  # its output
    launch: Callable[[], None] | None = None  # once it is captured


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
        self._buckets: dict[tuple[Any, ...], _Bucket] = {}  # by rows, backend, kind of sampling

    @property
    def nbytes(self) -> int:
        """Bytes of its activations."""
        return self.work.nbytes + self._last.nbytes

    def record(self, total: int, sequences: int, state: DecodeState | None = None) -> None:
        """Record what :meth:`run` will run for sequences with so many tokens in all.

        Its kernels are compiled from now on, beside others.
        """
        if self.model.xp is np:
            return
        if state is not None and self._dequantises():
            state = None
        if rows := self._bucket_size(total):
            self._bucket(rows, state)
            return
        packed = PackedPrompts(total, self._sequences(sequences), self.model.xp)
        with recorded():
            self._queue(packed, total, state)

    def run(
        self,
        tokens: Sequence[np.ndarray],
        slots: Sequence[int],
        state: DecodeState | None = None,
    ) -> Any:
        """Extend slots by new tokens.

        Parameters
        ----------
        tokens, slots
            As in :meth:`GPT2.prefill`.
        state : DecodeState, optional
            For one sequence in a cache of one slot: sample its first token too, in the same
            graph, so that these kernels need no launch of their own and load their weights
            while the prompt's last ones run. Where the logits need a matrix that has to be
            dequantised, behind the graph: each bucket would keep memory for all of it.

        Returns
        -------
        array [R, C]
            Residual stream of each sequence's last token; rows past the last sequence hold
            nothing of use.
        """
        total = sum(len(t) for t in tokens)
        rows = self._bucket_size(total)
        if not rows:
            packed = PackedPrompts(total, self._sequences(len(tokens)), self.model.xp)
            packed.fill(tokens, slots, self.cache)
            return self._queue(packed, max(len(t) for t in tokens), state)
        if state is not None and self._dequantises():
            x = self.run(tokens, slots)
            sample_first(self.model, state, x[:1], 0)
            return x
        bucket = self._bucket(rows, state)
        if bucket.launch is None:
            bucket.launch = captured(bucket.calls)
        bucket.packed.fill(tokens, slots, self.cache)
        bucket.launch()
        return bucket.x

    def _bucket_size(self, total: int) -> int:
        """Rows of the graph for so many tokens; 0 where they are run launch by launch."""
        rows = next((n for n in BUCKETS if n >= total), 0)
        return rows if self._graphs and rows <= self.work.rows else 0

    def _sequences(self, count: int) -> int:
        # BLAS sums a product of one row in another order than one of several: on NumPy a single
        # sequence has an empty neighbour, as single rows have in a step.
        return max(count, 2) if self.model.xp is np else count

    def _dequantises(self) -> bool:
        """Whether the logits of one row need a matrix in full that is held in int8."""
        model = self.model
        return scratch_size(1, [model.weights.lm_head], model.dtype, model.backend) > 0

    def _queue(self, packed: PackedPrompts, longest: int, state: DecodeState | None) -> Any:
        work, last = self.work.first(packed.rows), self._last.first(len(packed.slots))
        x = self.model.run_packed(packed, longest, self.cache, work, last=last)
        if state is not None:
            sample_first(self.model, state, x[:1], 0)
        return x

    def _bucket(self, rows: int, state: DecodeState | None) -> _Bucket:
        """The bucket of so many rows, recorded if it is new."""
        kind = () if state is None else (state, state.counts, state.bias, state.plain)
        # Identities, which stay theirs because the bucket keeps the objects.
        key = rows, self.model.backend, *map(id, kind)
        if key not in self._buckets:
            packed = PackedPrompts(rows, min(rows, self.cache.slots), self.model.xp)
            with recorded() as calls:
                x = self._queue(packed, rows, state)
            self._buckets[key] = _Bucket(packed, kind, calls, x)
        return self._buckets[key]


def sample_first(model: GPT2, state: DecodeState, x: Any, row: int) -> None:
    """Queue the sampling of a row's first token, given the residual stream [1, C] before it."""
    logits = state.logits[row : row + 1]
    model.logits(x, state.work.first(1), logits)
    sample_next(state, logits, state.rows[row : row + 1])
