"""Log-probabilities of given tokens, of many texts in one pass.

Texts are cut into windows; windows of all texts run packed without padding, and logits are made of
the tokens that are scored alone. While the GPU runs one pass, the host prepares the next.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..errors import NonFiniteError
from ..model import GPT2
from ..ops.core.tape import recorded
from ..workspace import PackedPrompts
from .text import PromptScore
from .windows import Window, windows

# Tokens of a pass. What the host writes for one stays below 64 KB, so that the driver need not
# wait for the pass before to copy it.
ROWS = 4096
ROWS_ON_HOST = 1024
LOGIT_ROWS = 512  # tokens whose logits are in memory at once
LEAD = 2  # passes queued before the oldest is read, on a GPU

_known: weakref.WeakSet[GPT2] = weakref.WeakSet()  # models that have scored a text


@dataclass(frozen=True)
class Found:
    """What was found of a window.

    Attributes
    ----------
    logprobs : numpy.ndarray of float32 [N]
        Of each scored token.
    top : (numpy.ndarray of int32 [N, K], numpy.ndarray of float32 [N, K]) or None
        The most probable tokens in the place of each, and their log-probabilities.
    """

    logprobs: np.ndarray
    top: tuple[np.ndarray, np.ndarray] | None


class _Arriving:
    """Device arrays on their way to the host.

    Parameters
    ----------
    xp : module
    parts : list of tuple of arrays
        To be joined along their first axis.
    """

    def __init__(self, xp: Any, parts: list[tuple[Any, ...]]) -> None:
        self._kept = parts  # what is copied lives until it has been
        self._event: Any = None
        if xp is np:
            self._host = parts
            return
        runtime, stream = xp.cuda.runtime, xp.cuda.get_current_stream()

        def queued(array: Any) -> np.ndarray:
            pinned = xp.cuda.alloc_pinned_memory(array.nbytes)
            to = runtime.memcpyDeviceToHost
            runtime.memcpyAsync(pinned.ptr, array.data.ptr, array.nbytes, to, stream.ptr)
            return np.frombuffer(pinned, array.dtype, array.size).reshape(array.shape)

        self._host = [tuple(map(queued, arrays)) for arrays in parts]
        self._event = xp.cuda.Event(disable_timing=True)
        self._event.record()

    def arrays(self) -> list[np.ndarray]:
        """Wait for them."""
        if self._event is not None:
            self._event.synchronize()
        return [np.concatenate(several) for several in zip(*self._host, strict=True)]


class _PassCache:
    """Keys and values of one pass. No layer needs those of another: they share memory.

    It stands where :meth:`GPT2.run_packed` takes a KVCache; its shape changes from pass to pass.
    """

    def __init__(self, model: GPT2, tokens: int) -> None:
        self._model = model
        size = tokens * model.config.n_embd
        self._memory = [model.xp.zeros(size, model.dtype) for _ in range(2)]
        self.layers: list[tuple[Any, Any]] = []
        self.lengths = np.zeros(0, np.int32)
        self.capacity = 0

    def shape(self, slots: int, capacity: int) -> None:
        """Become empty slots of that capacity."""
        config = self._model.config
        shape = slots, config.n_head, capacity, config.head_size
        size = slots * capacity * config.n_embd
        k, v = (memory[:size].reshape(shape) for memory in self._memory)
        self.layers = [(k, v)] * config.n_layer
        self.lengths = np.zeros(slots, np.int32)
        self.capacity = capacity


class Scorer:
    """Scores windows, many in a pass; used by one thread at a time.

    Parameters
    ----------
    model : GPT2
    """

    def __init__(self, model: GPT2) -> None:
        self.model = model
        on_host = model.xp is np
        self.rows = max(ROWS_ON_HOST if on_host else ROWS, model.config.n_positions)
        self._lead = 0 if on_host else LEAD
        self._work = model.new_workspace(self.rows)
        self._logits_work = model.new_workspace(LOGIT_ROWS)
        shape = LOGIT_ROWS, model.config.padded_vocab_size
        self._logits = model.xp.empty(shape, self._work.x.dtype)
        # A slot is as long as the longest window of its pass.
        self._cache = _PassCache(model, 2 * self.rows)

    def run(self, given: Iterable[Window], top: int = 0) -> Iterator[Found]:
        """What is found of each window, in their order; they are read a few passes ahead.

        Parameters
        ----------
        given : iterable of Window
        top : int
            How many of the most probable tokens to give with each.
        """
        queued: deque[tuple[list[Window], _Arriving]] = deque()
        for several in self._passes(given):
            if self.model.xp is not np and self.model not in _known:
                _known.add(self.model)
                with recorded():  # nothing runs, but its kernels are compiled side by side
                    self._queue(several, top)
            # NumPy would warn of an overflow; a log-probability of NaN is what comes of it.
            with np.errstate(over="ignore", invalid="ignore"):
                queued.append((several, self._queue(several, top)))
            if len(queued) > self._lead:
                yield from _taken_apart(*queued.popleft())
        while queued:
            yield from _taken_apart(*queued.popleft())

    def _passes(self, given: Iterable[Window]) -> Iterator[list[Window]]:
        """Windows that fit into one pass, in order."""
        several: list[Window] = []
        rows = longest = 0
        for window in given:
            length = len(window.tokens) - 1
            widest = max(longest, length)
            full = rows + length > self.rows or (len(several) + 1) * widest > 2 * self.rows
            if several and full:
                yield several
                several, rows, widest = [], 0, length
            several.append(window)
            rows, longest = rows + length, widest
        if several:
            yield several

    def _queue(self, several: list[Window], top: int) -> _Arriving:
        """Queue a pass; returns log-probabilities, and the most probable tokens, of all."""
        model, xp = self.model, self.model.xp
        inputs = [window.tokens[:-1] for window in several]
        longest = max(map(len, inputs))
        self._cache.shape(len(inputs), longest)
        packed = PackedPrompts(sum(map(len, inputs)), len(inputs), xp)
        starts = packed.fill(inputs, range(len(inputs)), self._cache)  # type: ignore[arg-type]
        work = self._work.first(packed.rows)
        x = model.run_packed(packed, longest, self._cache, work)  # type: ignore[arg-type]
        rows = [
            np.arange(start + window.first - 1, start + len(window.tokens) - 1, dtype=np.int32)
            for start, window in zip(starts.tolist(), several, strict=False)
        ]
        places = xp.asarray(np.concatenate(rows))
        targets = xp.asarray(np.concatenate([window.tokens[window.first :] for window in several]))
        parts = [slice(start, start + LOGIT_ROWS) for start in range(0, len(places), LOGIT_ROWS)]
        return _Arriving(xp, [self._score(x, places[p], targets[p], top) for p in parts])

    def _score(self, x: Any, places: Any, targets: Any, top: int) -> tuple[Any, ...]:
        """Logits of some rows, and what is wanted of them."""
        size, count = self.model.config.vocab_size, len(places)
        work, logits = self._logits_work.first(count), self._logits[:count]
        ops.lookup(places, x, out=work.x)
        self.model.logits(work.x, work, logits)
        found = ops.target_logprobs(logits, size, targets)
        return (found, *ops.top_logprobs(logits, size, top)) if top else (found,)


def _taken_apart(several: list[Window], arriving: _Arriving) -> Iterator[Found]:
    """What belongs to each window of a pass."""
    logprobs, *top = arriving.arrays()
    start = 0
    for window in several:
        part = slice(start, start + window.scored)
        both = (top[0][part], top[1][part]) if top else None
        yield Found(logprobs[part], both)
        start = part.stop


def token_logprobs(
    scorer: Scorer, texts: Iterable[tuple[np.ndarray, int]], window: int, stride: int
) -> Iterator[np.ndarray]:
    """Log-probabilities of the tokens of each text from its ``first`` one on, float32.

    They are NaN where logits are not finite. Where that begins cannot be told: attention sums
    masked values too, times 0.

    Parameters
    ----------
    scorer : Scorer
    texts : iterable of (numpy.ndarray of int32 [N], int)
        Tokens, and the first that is scored.
    window, stride : int
        As in :func:`windows`.
    """
    counts: deque[int] = deque()

    def all_windows() -> Iterator[Window]:
        for tokens, first in texts:
            own = windows(tokens, first, window, stride)
            counts.append(len(own))
            yield from own

    found = scorer.run(all_windows())
    for part in found:
        parts = [part.logprobs]
        parts += [next(found).logprobs for _ in range(counts.popleft() - 1)]
        yield np.concatenate(parts) if len(parts) > 1 else parts[0]


def prompt_scores(scorer: Scorer, prompts: Iterable[np.ndarray], top: int) -> Iterator[PromptScore]:
    """Log-probabilities of prompts' own tokens, after the first of each.

    Parameters
    ----------
    scorer : Scorer
    prompts : iterable of numpy.ndarray of int32 [T]
        Each at most ``n_positions`` tokens.
    top : int
        How many of the most probable tokens to give with each.
    """
    several = list(prompts)
    found = scorer.run((Window(ids, 1) for ids in several if len(ids) > 1), top)
    for ids in several:
        if len(ids) == 1:
            yield PromptScore([], [])
            continue
        each = next(found)
        pairs: list[list[tuple[int, float]]] = [[]] * len(each.logprobs)
        if each.top is not None:
            columns = each.top[0].tolist(), each.top[1].tolist()
            pairs = [list(zip(*both, strict=True)) for both in zip(*columns, strict=True)]
        yield PromptScore(each.logprobs.tolist(), pairs)


def non_finite(model: GPT2, where: str, **results: Any) -> NonFiniteError:
    """The error for logits that are not finite, with the remedy for this model's dtype."""
    if model.dtype == np.float16:
        remedy = 'float16 ends at 65504: load the model with dtype="bfloat16" or "float32".'
    else:
        remedy = "The weights overflow: take another checkpoint, or repair this one."
    what = "the model's logits are not finite"
    return NonFiniteError(what, where=where, remedy=remedy, **results)
