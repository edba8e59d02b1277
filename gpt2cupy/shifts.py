"""What steps of one row have beside the weights: the biases of norms, folded into the next ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import ops
from .ops.core.tape import load, recorded, recording
from .ops.shift import takes_shift

Array = Any
Pair = tuple[Array | None, Array | None]

_NORMS = {"qkv": "ln1", "fc": "ln2"}  # the norm before each product


class NormShifts:
    """``ops.shifted_bias`` of the products after the norms of all layers.

    They depend on no token, so they are made once, and hold for the weights as they then are; see
    ``norm_gemv_once`` in norm_gemv.cu. A decoder calls :meth:`record` before it records a step,
    so that their kernels are compiled beside its own, and :meth:`make` before the step runs.

    Parameters
    ----------
    layers : sequence of dict
        Weights of each layer by name.
    backend : {"ours", "cublas", "invariant"}
        Backend of the GEMVs; only ours has a use for shifts.

    Attributes
    ----------
    nbytes : int
        Bytes that the shifts take, made or not yet.
    pairs : list of (array of float32 [3C] or None, array of float32 [F] or None)
        Those of qkv and fc of each layer; None where a kernel has no use for it, and
        before :meth:`record`.
    """

    def __init__(self, layers: Sequence[dict[str, Array]], backend: str) -> None:
        self._layers = layers
        first = layers[0]
        self._sizes = {
            name: len(first[f"{name}_w"])
            for name in _NORMS
            if takes_shift(first[f"{name}_w"], backend)
        }
        self.nbytes = 4 * len(layers) * sum(self._sizes.values())
        self.pairs: list[Pair] = [(None, None)] * len(layers)
        self._recorded = not self._sizes
        self._calls: list[Callable[[], Any]] = []  # launches that are still to be run
        self._lock = threading.Lock()  # engines of one model may run side by side

    def record(self, xp: Any) -> None:
        """Record what makes them, if that is still to be done; not inside another recording."""
        with self._lock:
            if self._recorded:
                return
            sizes = self._sizes.items()
            shifts = {n: xp.empty((len(self._layers), m), np.float32) for n, m in sizes}
            pairs: list[Pair] = []
            with recorded() as calls:
                for index, w in enumerate(self._layers):
                    made = {}
                    for name, stacked in shifts.items():
                        biases, out = (w[f"{_NORMS[name]}_b"], w[f"{name}_b"]), stacked[index]
                        made[name] = ops.shifted_bias(biases[0], w[f"{name}_w"], biases[1], out=out)
                    pairs.append((made.get("qkv"), made.get("fc")))
            self.pairs, self._calls, self._recorded = pairs, calls, True
            # On NumPy nothing is recorded: the ops have made them.

    def make(self, xp: Any) -> None:
        """Run what :meth:`record` recorded, once, and wait for it: steps may run on any stream."""
        with self._lock:
            if not self._calls:
                return
            load(self._calls)
            for call in self._calls:
                call()
            xp.cuda.get_current_stream().synchronize()
            self._calls = []

    def of_step(self, xp: Any) -> list[Pair]:
        """:attr:`pairs` for a step that runs, or is recorded, now."""
        if not recording():
            self.make(xp)
        return self.pairs
