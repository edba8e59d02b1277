"""KVCache: keys and values of past tokens, one slot per sequence, capacity fixed at creation."""

from __future__ import annotations

from typing import Any

import numpy as np

from .config import GPT2Config
from .errors import InputError


class KVCache:
    """Keys and values ``[L, S, NH, T, HS]`` of ``S`` sequences of up to ``T`` tokens.

    There is no paging: a GPT-2 slot is small (36 MiB at 124M, fp16, 1024
    tokens), and a slot of fixed place needs no table look-up in attention.
    Nothing beyond a slot's length is ever read.

    Parameters
    ----------
    config : GPT2Config
    slots : int
        Sequences that it has room for at once.
    capacity : int, optional
        Tokens per slot; ``config.n_positions`` by default.
    dtype : dtype
        Dtype of keys and values, that of the weights.
    xp : module
        ``numpy`` or ``cupy``.

    Attributes
    ----------
    k, v : array [L, S, NH, T, HS]
    lengths : numpy.ndarray of int32 [S]
        Tokens queued into each slot, known to the host without asking the device.
    """

    def __init__(
        self,
        config: GPT2Config,
        slots: int = 1,
        capacity: int | None = None,
        dtype: Any = np.float32,
        xp: Any = np,
    ) -> None:
        capacity = config.n_positions if capacity is None else capacity
        if slots < 1 or not 1 <= capacity <= config.n_positions:
            raise InputError(
                f"a cache of {slots} slots of {capacity} tokens is impossible",
                where="KVCache",
                remedy=f"Take at least one slot and 1 to {config.n_positions} tokens.",
            )
        shape = (config.n_layer, slots, config.n_head, capacity, config.head_size)
        self.k = xp.zeros(shape, dtype)
        self.v = xp.zeros(shape, dtype)
        self.lengths = np.zeros(slots, np.int32)
        # Indexing a device array costs microseconds: take the layers' views once.
        self.layers = [(self.k[layer], self.v[layer]) for layer in range(config.n_layer)]

    @property
    def slots(self) -> int:
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """Tokens that one slot can hold."""
        return self.k.shape[3]

    @property
    def nbytes(self) -> int:
        return self.k.nbytes + self.v.nbytes

    def reset(self, slot: int | None = None) -> None:
        """Forget one slot, or all of them."""
        self.lengths[slice(None) if slot is None else slot] = 0

    def trim(self, slot: int, length: int) -> None:
        """Forget what slot ``slot`` holds beyond its first ``length`` tokens.

        Raises
        ------
        InputError
            If the slot holds fewer tokens.
        """
        if not 0 <= length <= self.lengths[slot]:
            raise InputError(
                f"cannot trim {self.lengths[slot]} tokens to {length}",
                where=f"cache slot {slot}",
                remedy="Trim to a length between 0 and the current one.",
            )
        self.lengths[slot] = length
