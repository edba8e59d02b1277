"""The ways to the logits of given tokens: whole, cached by a decoder, in float64, the baseline."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..decode import Decoder, DecodeState, PromptRunner
from ..decode.prompt import BUCKETS
from ..model import GPT2
from ..ops import reference_product
from ..ops.core.device import device_errors
from ..quantize import QuantizedMatrix, dequantize
from ..sampling import SamplingParams
from ..weights import Weights
from ..workspace import PackedPrompts

Array = Any


def host(array: Array) -> np.ndarray:
    """The array in host memory."""
    return array if isinstance(array, np.ndarray) else array.get()


@contextlib.contextmanager
def on_device(model: GPT2) -> Iterator[None]:
    """The model's device and a stream of its own, as the engine has them."""
    if model.xp is np:
        yield
        return
    # The device first: a stream belongs to the one that is current when it is made.
    stream = model.xp.cuda.Stream
    with model.weights.wte.device, stream(non_blocking=True), device_errors("validating"):
        yield


def host_weights(model: GPT2) -> Weights:
    """The values that the model holds, in its dtype, in host memory.

    Those of matrices in int8 are exact in float32 only: with such, all are.
    """
    if model.xp is np:
        return model.weights
    in_int8 = isinstance(model.weights.wte, QuantizedMatrix)
    copy = Weights.empty(model.config, np.float32 if in_int8 else model.dtype)
    for name, array in model.weights.items():
        if isinstance(array, QuantizedMatrix):
            array = QuantizedMatrix(host(array.values), host(array.scales))
            getattr(copy, name)[...] = dequantize(array)
        else:
            getattr(copy, name)[...] = host(array)
    return copy


def rounded(config: GPT2Config, weights: Weights, dtype: np.dtype) -> Weights:
    """The weights in ``dtype``: themselves where they have it."""
    return weights if weights.dtype == dtype else _copied(config, weights, dtype)


def widened(config: GPT2Config, weights: Weights) -> Weights:
    """The same values in float64: what the reference computes with."""
    return _copied(config, weights, np.dtype(np.float64))


def _copied(config: GPT2Config, weights: Weights, dtype: np.dtype) -> Weights:
    copy = Weights.empty(config, dtype)
    for name, array in weights.items():
        getattr(copy, name)[...] = array.astype(np.float64)
    return copy


def exact(config: GPT2Config, weights: Weights, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] in float64 from the values of ``weights``."""
    return GPT2(config, widened(config, weights))(ids)


def baseline(config: GPT2Config, weights: Weights, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] as the error rule's baseline: float32 sums, results rounded to the dtype.

    The sums are plain ones, as BLAS makes them: the engine's own sum in parts is finer than
    what the rule compares with.
    """
    whole = contextvars.copy_context()
    whole.run(reference_product.PART.set, max(config.inner_size, config.n_embd))
    return whole.run(GPT2(config, weights), ids).astype(weights.dtype)


def full(model: GPT2, ids: np.ndarray) -> np.ndarray:
    """Logits [B, T, V] of one pass over all tokens."""
    with on_device(model):
        return host(model(ids))


def layers(model: GPT2, ids: np.ndarray) -> list[np.ndarray]:
    """Residual stream [B, T, C] after the embedding and after each layer: L + 1 arrays."""
    batch, length = ids.shape
    with on_device(model):
        cache, work = model.new_cache(batch, length), model.new_workspace(batch * length)
        packed = PackedPrompts(work.rows, batch, model.xp)
        packed.fill(list(ids), range(batch), cache)
        states = model.xp.empty((model.config.n_layer + 1, *work.x.shape), work.x.dtype)
        # Not GPT2.hidden_states: its last is after the final norm.
        states[-1] = model.run_packed(packed, length, cache, work, states)
        return list(host(states).reshape(-1, batch, length, model.config.n_embd))


def start(model: GPT2, ids: np.ndarray, prefilled: int, *, graphs: bool = False) -> DecodeState:
    """A state whose cache holds the first ``prefilled`` tokens of each row of ids [B, T].

    ``graphs`` says whether they are run from a graph, where the device has them.
    """
    batch, length = ids.shape
    cache = model.new_cache(batch, length)
    state = DecodeState(model, cache, batch)
    settings = SamplingParams().row(0, length, -1)
    for row in range(batch):
        state.assign(row, row, settings)
    if prefilled:
        work = model.new_workspace(max(batch * prefilled, BUCKETS[-1]))
        prompts = PromptRunner(model, cache, work, graphs=graphs)
        prompts.run(list(ids[:, :prefilled]), range(batch))
        host(state.steps)  # waits: the graph goes with its owner
    return state


def feed(state: DecodeState, tokens: np.ndarray, position: int) -> None:
    """Make ``tokens`` [B] at ``position`` what the next step feeds, whatever the last one chose."""
    for array, values in ((state.ids, tokens), (state.positions, np.full(len(tokens), position))):
        whole = np.ascontiguousarray(values, np.int32)
        if state.xp is np:
            array[...] = whole
        else:
            array.set(whole)


def cached(decoder: Decoder, ids: np.ndarray, prefilled: int = 0) -> np.ndarray:
    """Logits [B, T - prefilled, V] of one decode step per token, each fed the given token."""
    model = decoder.model
    found = []
    with on_device(model):
        state = start(model, ids, prefilled, graphs=decoder.name != "eager")
        decoder.prepare(state)
        for position in range(prefilled, ids.shape[1]):
            feed(state, ids[:, position], position)
            decoder.step(state)
            found.append(host(state.logits)[:, : state.vocab_size].copy())
    return np.stack(found, axis=1)
