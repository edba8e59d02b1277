"""DecodeState: every array that a decode step touches, in device memory, allocated once."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from ..cache import KVCache
from ..errors import DeviceError
from ..model import GPT2
from ..ops.reference_sampling import PROMPT_BIT
from ..ops.sampling import RING_ENTRY
from ..sampling import SamplingParams

RING = 16  # tokens of a row that may wait to be read: those of the steps queued ahead, and more
_PAUSE = 1e-5  # seconds asked for between two looks for a token; the system makes more of them

_BY_ROW = ("ids", "positions", "slots", "steps", "rows", "params", "logits", "scratch", "ring")

S = TypeVar("S", bound="DecodeState")


class DecodeState:
    """Batch, cache, activations and the token ring of one decode step.

    Kernels advance ids, positions and steps; the host writes a row only when it
    gives it to a new sequence, so a captured step can be replayed as it is.

    Parameters
    ----------
    model : GPT2
    cache : KVCache
    batch : int
        Rows B of a step.

    Attributes
    ----------
    ids, positions : array of int32 [B]
        Token to feed next and its position.
    slots : array of int32 [B]
        Cache slot of each row; -1 marks an idle row.
    steps : array of uint32 [B]
        Tokens sampled so far in each row.
    params : array of uint8 [B, 48]
        ``ROW_PARAMS`` of each row.
    logits, scratch : array of float32 [B, Vp]
    counts, bias : array [B, V] or None
        Allocated when the first request asks for a penalty or a bias.
    mailboxes : array of uint8 or None
        What the blocks of a persistent step tell each other through; allocated when one is
        prepared.
    ring : array of uint8 [B, RING, 16]
        Where sampled tokens reach the host; on the GPU, mapped pinned memory.
    """

    _by_row: tuple[str, ...] = _BY_ROW

    def __init__(self, model: GPT2, cache: KVCache, batch: int) -> None:
        xp, config = model.xp, model.config
        self.xp = xp
        self.vocab_size = config.vocab_size
        self.cache = cache
        self.work = model.new_workspace(batch)
        self.ids = xp.zeros(batch, np.int32)
        self.positions = xp.zeros(batch, np.int32)
        self.slots = xp.asarray(np.full(batch, -1, np.int32))
        self.steps = xp.zeros(batch, np.uint32)
        self.rows = xp.asarray(np.arange(batch, dtype=np.int32))
        idle = SamplingParams().row(0, 0, -1).view(np.uint8).reshape(1, -1)
        self.params = xp.asarray(np.repeat(idle, batch, axis=0))
        wide = self.work.x.dtype
        self.logits = xp.zeros((batch, config.padded_vocab_size), wide)
        self.scratch = xp.zeros((batch, config.padded_vocab_size), wide)
        self.biased: set[int] = set()  # rows whose bias is not all zeros
        self.shaped: set[int] = set()  # rows whose sampling needs more than a temperature
        self._one_kernel = model.batch_invariant  # samples, whatever the rows ask for
        self.counts: Any = None
        self.bias: Any = None
        self.mailboxes: Any = None
        shape = (batch, RING, RING_ENTRY.itemsize)
        if xp is np:
            self.ring = np.zeros(shape, np.uint8)
            host = self.ring
        else:
            host, self.ring = _mapped(xp, shape)
        self._entries = host.view(RING_ENTRY)[..., 0]
        self._views: dict[int, Any] = {}

    @property
    def batch(self) -> int:
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Bytes of everything but the cache."""
        own = [value for value in vars(self).values() if hasattr(value, "nbytes")]
        return sum(a.nbytes for a in own if a is not self.cache and a is not self._entries)

    @property
    def plain(self) -> bool:
        """Whether the kernel for no more than a temperature may sample."""
        return not (self.shaped or self._one_kernel)

    def assign(self, row: int, slot: int, params: np.ndarray, plain: bool = True) -> None:
        """Give a row to a sequence in ``slot`` (-1: to nobody), with its ``ROW_PARAMS``.

        ``plain`` says that they ask for no more than a temperature.
        """
        (self.shaped.discard if plain else self.shaped.add)(row)
        self._write(self.slots, row, np.array([slot], np.int32))
        self._write(self.params, row, params.view(np.uint8).reshape(1, -1))

    def seek(self, row: int, position: int) -> None:
        """Say which position a row's last fed token has, before its next token is sampled."""
        self._write(self.positions, row, np.array([position], np.int32))

    def enter(
        self,
        first: int,
        slots: Sequence[int],
        params: Sequence[np.ndarray],
        plain: Sequence[bool],
        positions: Sequence[int],
    ) -> None:
        """:meth:`assign` and :meth:`seek` for neighbouring rows, the first of them ``first``."""
        for row, simple in enumerate(plain, first):
            (self.shaped.discard if simple else self.shaped.add)(row)
        self._write(self.slots, first, np.array(slots, np.int32))
        lines = [each.view(np.uint8).reshape(1, -1) for each in params]
        self._write(self.params, first, np.concatenate(lines))
        self._write(self.positions, first, np.array(positions, np.int32))

    def move(self, row: int, to: int) -> None:
        """Let another row go on with what a row does; its token ring stays its own."""
        for rows in (self.shaped, self.biased):
            (rows.add if row in rows else rows.discard)(to)
        for array in (self.ids, self.positions, self.slots, self.params, self.counts, self.bias):
            if array is None:
                continue
            source, target = array[row : row + 1], array[to : to + 1]
            if self.xp is np:
                target[...] = source
            else:
                stream = self.xp.cuda.get_current_stream()
                target.data.copy_from_device_async(source.data, source.nbytes, stream)

    def release(self, first: int, end: int) -> None:
        """Leave rows to nobody."""
        self.shaped.difference_update(range(first, end))
        self._write(self.slots, first, np.full(end - first, -1, np.int32))

    def first(self: S, rows: int) -> S:
        """The same memory, seen as a state of fewer rows."""
        if rows == self.batch:
            return self
        if rows not in self._views:
            view = copy.copy(self)
            view.counts = view.bias = view.mailboxes = None  # of as many rows as it has
            for name in self._by_row:
                setattr(view, name, getattr(self, name)[:rows])
            view.work = self.work.first(rows)
            view._views = {}  # with itself in it, it would live until a garbage collection
            self._views[rows] = view
            self._share_processors()
        return self._views[rows]

    def _share_processors(self) -> None:
        """Let views see counts and bias, which appear when a request needs them."""
        for rows, view in self._views.items():
            for name in ("counts", "bias"):
                array = getattr(self, name)
                if array is not None and getattr(view, name) is None:
                    setattr(view, name, array[:rows])

    def set_processors(self, row: int, counted: Any | None, bias: Any | None) -> None:
        """Start a row's token counts from its prompt's ids, and its logit bias; None clears.

        Counts that a row has from before mean nothing where its settings ask for no penalty.
        """
        if counted is not None:
            if self.counts is None:
                self.counts = self.xp.zeros((self.batch, self.vocab_size), np.int32)
            self._share_processors()
            line = np.zeros(self.vocab_size, np.int32)
            line[counted] = PROMPT_BIT
            self._write(self.counts, row, line[None])
        self.set_bias(row, bias)

    def set_bias(self, row: int, bias: Any | None) -> None:
        """Give a row its logit bias, a mapping of token ids; None clears it."""
        if bias and self.bias is None:
            self.bias = self.xp.zeros((self.batch, self.vocab_size), np.float32)
        self._share_processors()
        # A line is as long as the vocabulary: most rows have none before and after.
        if self.bias is not None and (bias or row in self.biased):
            (self.biased.add if bias else self.biased.discard)(row)
            values = np.zeros(self.vocab_size, np.float32)
            for token, value in (bias or {}).items():
                values[token] = value
            self._write(self.bias, row, values[None])

    def step_back(self, row: int, position: int) -> None:
        """Make a row as it was before its last token was sampled, so that another can be.

        Waits for the device. The token stays in the ring, and ``steps`` counts it.

        Parameters
        ----------
        row : int
        position : int
            As of :meth:`seek`.
        """
        if self.counts is not None:
            token = int(self.ids[row])
            count = self.counts[row, token : token + 1]
            self._write(count, 0, (count if self.xp is np else count.get()) - 1)
        self.seek(row, position)

    def _write(self, array: Any, first: int, values: np.ndarray) -> None:
        """Set neighbouring rows, in the order of the stream."""
        part = array[first : first + len(values)]
        if self.xp is np:
            part[...] = values
        elif len(values):
            part.set(values)

    def read(self, row: int, step: int) -> tuple[int, float]:
        """Wait for token number ``step`` of a row: its id and log-probability."""
        ids, logprobs = self.read_rows(slice(row, row + 1), np.array([step]))
        return int(ids[0]), float(logprobs[0])

    def read_rows(self, rows: slice, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Wait for one token of each of some rows.

        Parameters
        ----------
        rows : slice
        steps : array of int [N]
            Number of the token of each row.

        Returns
        -------
        ids : numpy.ndarray of int32 [N]
        logprobs : numpy.ndarray of float32 [N]

        Raises
        ------
        DeviceError
            If the step ended without writing them.
        """
        places = np.arange(rows.start, rows.stop), steps % RING
        stamps = (steps + 1).astype(np.uint32)
        if self.xp is not np:
            self._wait(places, stamps)
        # The stamps are there, and each came with the half of the entry that it belongs to.
        entries = self._entries[places]
        return entries["id"].copy(), entries["logprob"].copy()

    def _wait(self, places: tuple[np.ndarray, np.ndarray], stamps: np.ndarray) -> None:
        stream = self.xp.cuda.get_current_stream()
        spins = 0

        def arrived() -> bool:
            entries = self._entries[places]
            both = (entries["stamp"] == stamps) & (entries["stamp_again"] == stamps)
            return bool(both.all())

        while not arrived():
            spins += 1
            # Other threads need the interpreter, such as that of a model on another GPU. A sleep
            # of nothing would have it back before they wake; this one takes some 60 us, which
            # the steps queued ahead cover.
            time.sleep(_PAUSE if threading.active_count() > 1 else 0)
            # The stamp comes through memory; asking the driver is only for the case that
            # the step died and never writes it.
            if spins % 1024 == 0 and stream.done and not arrived():
                stream.synchronize()
                raise DeviceError(
                    "a decode step ended without writing its token",
                    where=f"rows {places[0].tolist()}",
                    remedy="This is a bug of gpt2cupy; please report it.",
                )

    def to_host(self, array: Any) -> np.ndarray:
        """Pinned memory that a device array is being copied to, in the order of the stream."""
        cupy = self.xp
        pinned = cupy.cuda.alloc_pinned_memory(array.nbytes)
        stream = cupy.cuda.get_current_stream().ptr
        to = cupy.cuda.runtime.memcpyDeviceToHost
        cupy.cuda.runtime.memcpyAsync(pinned.ptr, array.data.ptr, array.nbytes, to, stream)
        return np.frombuffer(pinned, array.dtype, array.size).reshape(array.shape)


def _mapped(cupy: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, Any]:
    """Host memory that kernels write through its device address: both views of it."""
    size = int(np.prod(shape))
    pinned = cupy.cuda.alloc_pinned_memory(size)
    host = np.frombuffer(pinned, np.uint8, size).reshape(shape)
    host[...] = 0
    device = cupy.cuda.runtime.getDevice()
    memory = cupy.cuda.UnownedMemory(pinned.ptr, size, pinned, device)
    return host, cupy.ndarray(shape, np.uint8, cupy.cuda.MemoryPointer(memory, 0))
