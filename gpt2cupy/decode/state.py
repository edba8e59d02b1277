"""DecodeState: every array that a decode step touches, in device memory, allocated once."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cache import KVCache
from ..errors import DeviceError
from ..model import GPT2
from ..ops.reference_sampling import PROMPT_BIT
from ..ops.sampling import RING_ENTRY
from ..sampling import SamplingParams

RING = 8  # tokens of a row that may wait to be read; a step is queued before the last is read


class DecodeState:
    """Batch, cache, activations and the ring of one decode step.

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
        Tokens chosen so far in each row.
    params : array of uint8 [B, 48]
        ``ROW_PARAMS`` of each row.
    logits, scratch : array of float32 [B, Vp]
    counts, bias : array [B, V] or None
        Allocated when the first request asks for a penalty or a bias.
    mailboxes : array of uint8 or None
        What the blocks of a persistent step tell each other through; allocated when one is
        prepared.
    ring : array of uint8 [B, RING, 16]
        Where chosen tokens reach the host; on the GPU, mapped pinned memory.
    """

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
        """Say which position a row's last fed token has, before its next token is chosen."""
        self._write(self.positions, row, np.array([position], np.int32))

    def set_processors(self, row: int, counted: Any | None, bias: Any | None) -> None:
        """Start a row's token counts from its prompt's ids, and its logit bias; None clears."""
        if counted is not None and self.counts is None:
            self.counts = self.xp.zeros((self.batch, self.vocab_size), np.int32)
        if self.counts is not None:
            line = np.zeros(self.vocab_size, np.int32)
            if counted is not None:
                line[counted] = PROMPT_BIT
            self._write(self.counts, row, line[None])
        self.set_bias(row, bias)

    def set_bias(self, row: int, bias: Any | None) -> None:
        """Give a row its logit bias, a mapping of token ids; None clears it."""
        if bias and self.bias is None:
            self.bias = self.xp.zeros((self.batch, self.vocab_size), np.float32)
        if self.bias is not None:
            values = np.zeros(self.vocab_size, np.float32)
            for token, value in (bias or {}).items():
                values[token] = value
            self._write(self.bias, row, values[None])

    def _write(self, array: Any, row: int, value: np.ndarray) -> None:
        """Set one row, in the order of the stream."""
        if self.xp is np:
            array[row : row + 1] = value
        else:
            array[row : row + 1].set(value)

    def read(self, row: int, step: int) -> tuple[int, float]:
        """Wait for token number ``step`` of a row: its id and log-probability."""
        entry = self._entries[row, step % RING]
        stamp = np.uint32(step + 1)
        if self.xp is not np:
            stream = self.xp.cuda.get_current_stream()
            spins = 0

            def arrived() -> bool:
                return entry["stamp"] == stamp and entry["stamp_again"] == stamp

            while not arrived():
                spins += 1
                # The stamp comes through memory; asking the driver is only for the case that
                # the step died and never writes it.
                if spins % 4096 == 0 and stream.done and not arrived():
                    stream.synchronize()
                    raise DeviceError(
                        "a decode step ended without writing its token",
                        where=f"row {row}, step {step}",
                        remedy="This is a bug of gpt2cupy; please report it.",
                    )
        return int(entry["id"]), float(entry["logprob"])


def _mapped(cupy: Any, shape: tuple[int, ...]) -> tuple[np.ndarray, Any]:
    """Host memory that kernels write through its device address: both views of it."""
    size = int(np.prod(shape))
    pinned = cupy.cuda.alloc_pinned_memory(size)
    host = np.frombuffer(pinned, np.uint8, size).reshape(shape)
    host[...] = 0
    device = cupy.cuda.runtime.getDevice()
    memory = cupy.cuda.UnownedMemory(pinned.ptr, size, pinned, device)
    return host, cupy.ndarray(shape, np.uint8, cupy.cuda.MemoryPointer(memory, 0))
