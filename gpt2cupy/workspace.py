"""What a forward pass reads and writes besides weights and cache: inputs and activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .cache import KVCache
from .config import GPT2Config
from .errors import InputError


class Workspace:
    """The activations of up to ``rows`` tokens, allocated once.

    Attributes
    ----------
    x : array [N, C]
        Residual stream, float32.
    h, qkv, attended, inner : array
        Normed input [N, C], [q | k | v] [N, 3C], attention output [N, C] and MLP
        [N, F], of the weights' dtype.
    scratch : array [n] or None
        Where a matrix of a layer is dequantised; of that dtype too.

    Parameters
    ----------
    config : GPT2Config
    rows : int
    dtype : dtype
    xp : module
        NumPy or CuPy.
    scratch : int
        Elements of ``scratch``.
    """

    def __init__(
        self, config: GPT2Config, rows: int, dtype: Any, xp: Any = np, *, scratch: int = 0
    ) -> None:
        c = config.n_embd
        wide = np.float64 if np.dtype(dtype) == np.float64 else np.float32
        self.x = xp.empty((rows, c), wide)
        self.h = xp.empty((rows, c), dtype)
        self.qkv = xp.empty((rows, 3 * c), dtype)
        self.attended = xp.empty((rows, c), dtype)
        self.inner = xp.empty((rows, config.inner_size), dtype)
        self.scratch = xp.empty(scratch, dtype) if scratch else None

    @property
    def rows(self) -> int:
        return len(self.x)

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in vars(self).values() if array is not None)

    def first(self, rows: int) -> Workspace:
        """The same memory, seen as the activations of fewer tokens."""
        if rows == self.rows:
            return self
        view = object.__new__(Workspace)
        for name, array in vars(self).items():
            setattr(view, name, array if name == "scratch" else array[:rows])
        return view


class PackedPrompts:
    """New tokens of several sequences, packed without padding, as a prefill reads them.

    Parameters
    ----------
    rows : int
        Tokens N that fit.
    sequences : int
        Sequences R that fit.
    xp : module
        NumPy or CuPy.

    Attributes
    ----------
    ids, positions : array of int32 [N]
    starts : array of int32 [R + 1]
        Sequence r owns the rows from ``starts[r]`` to ``starts[r + 1] - 1``.
    slots, past : array of int32 [R]
        Cache slot of each, and the tokens that it holds already.
    """

    def __init__(self, rows: int, sequences: int, xp: Any = np) -> None:
        sizes = [rows, rows, sequences + 1, sequences, sequences]
        # One block, so that one copy to the device fills all of them.
        self._host = np.zeros(sum(sizes), np.int32)
        self._block: Any = self._host if xp is np else xp.asarray(self._host)
        ends = np.cumsum(sizes).tolist()
        places = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        self._parts = [self._host[place] for place in places]
        self.ids, self.positions, self.starts, self.slots, self.past = (
            self._block[place] for place in places
        )

    @property
    def rows(self) -> int:
        return len(self.ids)

    def fill(
        self, tokens: Sequence[np.ndarray], slots: Sequence[int], cache: KVCache
    ) -> np.ndarray:
        """Put in the new tokens of ``slots`` and count them in ``cache.lengths``.

        Returns
        -------
        numpy.ndarray of int32 [R + 1]
            ``starts``, on the host. Rows and sequences that are left over are empty.

        Raises
        ------
        InputError
            If a slot has no room for them.
        """
        counts = [len(t) for t in tokens]
        past = [int(cache.lengths[slot]) for slot in slots]
        longest = max(n + p for n, p in zip(counts, past, strict=True))
        if longest > cache.capacity:
            raise InputError(
                f"{longest} tokens do not fit a cache slot of {cache.capacity}",
                where="prefill",
                remedy="Shorten the prompt or use a larger cache.",
            )
        self._host[...] = 0
        ids, positions, starts, rows, before = self._parts
        end = 0
        for index, (new, slot, first) in enumerate(zip(tokens, slots, past, strict=True)):
            start, end = end, end + len(new)
            ids[start:end] = new
            positions[start:end] = np.arange(first, first + len(new))
            starts[index + 1] = end
            rows[index], before[index] = slot, first
            cache.lengths[slot] += len(new)
        starts[len(counts) + 1 :] = end
        if self._block is not self._host:
            # Pageable memory is read before the copy returns: it can be filled again at once.
            host = self._host
            self._block.data.copy_from_host_async(host.ctypes.data, host.nbytes)
        return starts.copy()
