"""Running prompts: launch by launch, or from a graph per length bucket."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .. import ops
from ..cache import KVCache
from ..model import GPT2
from ..ops.core.tape import recorded
from ..ops.quantized import scratch_size
from ..workspace import PackedPrompts, Workspace
from .decoder import sampling_of
from .graph import captured
from .state import DecodeState
from .step import sample_next

# Tokens of a graph; a prompt takes the next larger one, at most half as many again.
BUCKETS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
MOST_GRAPHS = 128  # that a runner keeps: those used last


class Shape(NamedTuple):
    """What a graph for prompts takes at most: tokens in all, sequences, tokens of the longest."""

    rows: int
    sequences: int
    longest: int


@dataclass
class _Bucket:
    """The graph for prompts of up to a shape."""

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
        self._buckets: dict[tuple[Any, ...], _Bucket] = {}  # by shape, backend, kind of sampling
        self._most = MOST_GRAPHS
        self._fixed = False  # whether no more graphs are captured

    @property
    def nbytes(self) -> int:
        """Bytes of its activations."""
        return self.work.nbytes + self._last.nbytes

    def record(self, lengths: Sequence[int], state: DecodeState | None = None) -> None:
        """Record what :meth:`run` will run for sequences with so many new tokens each.

        Its kernels are compiled from now on, beside others.
        """
        if self.model.xp is np:
            return
        if state is not None and self._dequantises():
            state = None
        if shape := self._shape(lengths):
            self._bucket(shape, state)
            return
        packed = PackedPrompts(sum(lengths), self._sequences(len(lengths)), self.model.xp)
        with recorded():
            self._queue(packed, max(lengths), state)

    def capture(self, state: DecodeState | None = None) -> int:
        """Capture the graphs of :func:`shapes`; what has none later is run launch by launch.

        Parameters
        ----------
        state : DecodeState, optional
            As :meth:`run` will be given it.

        Returns
        -------
        int
            How many graphs there are.
        """
        if state is not None and self._dequantises():
            state = None
        all_shapes = shapes(self.work.rows, self.cache.slots)
        self._most = max(MOST_GRAPHS, len(all_shapes) + len(self._buckets))
        for shape in all_shapes:
            bucket = self._bucket(shape, state)
            bucket.launch = bucket.launch or captured(bucket.calls)
        self._fixed = True
        return len(self._buckets)

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
        lengths = [len(t) for t in tokens]
        shape = self._shape(lengths)
        if shape is not None and self._fixed and self._key(shape, state) not in self._buckets:
            shape = None
        if shape is None:
            packed = PackedPrompts(sum(lengths), self._sequences(len(tokens)), self.model.xp)
            packed.fill(tokens, slots, self.cache)
            return self._queue(packed, max(lengths), state)
        if state is not None and self._dequantises():
            x = self.run(tokens, slots)
            sample_first(self.model, state, x[:1], 0)
            return x
        bucket = self._bucket(shape, state)
        if bucket.launch is None:
            bucket.launch = captured(bucket.calls)
        bucket.packed.fill(tokens, slots, self.cache)
        bucket.launch()
        return bucket.x

    def copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        """Queue copies of beginnings from slot to slot; the targets hold nothing else then.

        Parameters
        ----------
        copies : sequence of (int, int, int)
            From slot, to slot, tokens. No slot may be copied from and to.
        """
        rows = np.array(copies, np.int32).T.copy()
        self.cache.lengths[rows[1]] = rows[2]
        ops.copy_slots(self.cache.k, self.cache.v, *self.model.xp.asarray(rows))

    def _shape(self, lengths: Sequence[int]) -> Shape | None:
        """The graph for sequences of such lengths; None where they are run launch by launch."""
        rows = next((n for n in BUCKETS if n >= sum(lengths)), 0)
        if not self._graphs or not rows or rows > self.work.rows:
            return None
        if len(lengths) == 1:
            return Shape(rows, 1, rows)
        # A grid for sequences and lengths that do not occur is blocks that start for nothing; but
        # every shape is a graph, so these are powers of four.
        sequences = min(_power_of_four(len(lengths)), rows, self.cache.slots)
        return Shape(rows, sequences, min(_power_of_four(max(lengths)), rows))

    def _sequences(self, count: int) -> int:
        # BLAS sums a GEMV in another order than one of several: on NumPy a single
        # sequence has an empty neighbour, as single rows have in a step.
        return max(count, 2) if self.model.xp is np else count

    def _dequantises(self) -> bool:
        """Whether the logits of one row need a matrix in full that is stored in int8."""
        model = self.model
        return scratch_size(1, [model.weights.lm_head], model.dtype, model.backend) > 0

    def _queue(self, packed: PackedPrompts, longest: int, state: DecodeState | None) -> Any:
        work, last = self.work.first(packed.rows), self._last.first(len(packed.slots))
        x = self.model.run_packed(packed, longest, self.cache, work, last=last)
        if state is not None:
            sample_first(self.model, state, x[:1], 0)
        return x

    def _bucket(self, shape: Shape, state: DecodeState | None) -> _Bucket:
        """The bucket of a shape, recorded if it is new."""
        key = self._key(shape, state)
        if key in self._buckets:
            self._buckets[key] = self._buckets.pop(key)  # the last one used is the last
        else:
            while len(self._buckets) >= self._most:
                del self._buckets[next(iter(self._buckets))]
            packed = PackedPrompts(shape.rows, shape.sequences, self.model.xp)
            with recorded() as calls:
                x = self._queue(packed, shape.longest, state)
            self._buckets[key] = _Bucket(packed, _kind(state), calls, x)
        return self._buckets[key]

    def _key(self, shape: Shape, state: DecodeState | None) -> tuple[Any, ...]:
        # Identities, which stay theirs because the bucket keeps the objects.
        return *shape, self.model.backend, *map(id, _kind(state))


def shapes(rows: int, slots: int) -> list[Shape]:
    """The usual shapes of up to so many tokens in all: one prompt, or 2 to 16 that are not tiny."""
    found, least = [], 0
    for size in (each for each in BUCKETS if each <= rows):
        found.append(Shape(size, 1, size))
        for sequences in (4, 16):
            for longest in (64, 256, 1024):
                fewest, shortest = sequences // 4 + 1, longest // 4 + 1
                fits = shortest + fewest - 1 <= size and sequences * longest > least
                if fits and fewest <= slots:
                    found.append(Shape(size, min(sequences, size, slots), min(longest, size)))
        least = size
    # Where the longest is as long as all together, two names mean one shape.
    return list(dict.fromkeys(found))


def _kind(state: DecodeState | None) -> tuple[Any, ...]:
    """What sampling in a prompt's graph depends on."""
    return () if state is None else sampling_of(state)


def _power_of_four(count: int) -> int:
    """The next power of four."""
    return 1 << (-(-(count - 1).bit_length() // 2) * 2)


def sample_first(model: GPT2, state: DecodeState, x: Any, row: int) -> None:
    """Queue the sampling of the first tokens of neighbouring rows, the first of them ``row``.

    Parameters
    ----------
    model : GPT2
    state : DecodeState
    x : array [R, C]
        Residual stream of the last token of each one's prompt.
    row : int
    """
    # BLAS sums a GEMV in another order than one of several, so NumPy takes them one
    # by one: the bits of a text do not depend on the prompts that ran beside its own.
    together = 1 if model.xp is np else len(x)
    for start in range(0, len(x), together):
        lines = slice(row + start, row + start + together)
        logits = state.logits[lines]
        model.logits(x[start : start + together], state.work.first(together), logits)
        sample_next(state, logits, state.rows[lines])
