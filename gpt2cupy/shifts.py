"""What steps of one row have beside the weights: the biases of norms, folded into the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import ops
from .ops.shift import takes_shift

Array = Any
Pair = tuple[Array | None, Array | None]

_NORMS = {"qkv": "ln1", "fc": "ln2"}  # the norm before each product


class NormShifts:
    """``ops.shifted_bias`` of the products after the norms of all layers.

    It depends on no token, so it is made once, and holds for the weights as they then are; see
    ``norm_gemv_once`` in norm_gemv.cu.

    Parameters
    ----------
    layers : sequence of dict
        Weights of each layer by name.
    backend : {"ours", "cublas", "invariant"}
        Who multiplies; only ours has a use for shifts.

    Attributes
    ----------
    nbytes : int
        Bytes that the shifts take, made or not yet.
    pairs : list of (array of float32 [3C] or None, array of float32 [F] or None)
        Those of qkv and fc of each layer; None where a kernel has no use for it, and
        before they are made.
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
        self._made = not self._sizes

    def make(self, xp: Any) -> None:
        """Make them, if that is still to be done; not while launches are being recorded."""
        if self._made:
            return
        shifts = {n: xp.empty((len(self._layers), m), np.float32) for n, m in self._sizes.items()}
        pairs: list[Pair] = []
        for index, w in enumerate(self._layers):
            made = {}
            for name, stacked in shifts.items():
                norm_bias, out = w[f"{_NORMS[name]}_b"], stacked[index]
                made[name] = ops.shifted_bias(norm_bias, w[f"{name}_w"], w[f"{name}_b"], out=out)
            pairs.append((made.get("qkv"), made.get("fc")))
        # Steps may run on other streams.
        xp.cuda.get_current_stream().synchronize()
        self.pairs, self._made = pairs, True
