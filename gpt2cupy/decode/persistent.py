"""The decode step as one kernel that stays on the GPU until the logits are there."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..model import GPT2
from ..ops.gpt2 import step
from ..quantize import QuantizedMatrix
from .state import DecodeState
from .step import StepFunction, sample_next


def why_not(model: GPT2, rows: int) -> str | None:
    """Why a model has no persistent step for so many rows, on its device; None if it has."""
    if model.xp is np:
        return "it needs a GPU"
    if model.batch_invariant:
        return "a batch-invariant model needs one order of sums for any number of rows"
    if model.gemv != "ours":
        return f"it has products of its own, and this model's are {model.gemv}'s"
    if isinstance(model.weights.wte, QuantizedMatrix):
        return "it has no int8"
    config = model.config
    with model.weights.wte.device:
        return step.why_not(rows, config.n_embd, config.inner_size, config.head_size, model.dtype)


def check(model: GPT2, rows: int) -> None:
    """Raise if a model has no persistent step for so many rows."""
    if reason := why_not(model, rows):
        raise InputError(
            f"there is no persistent step here: {reason}",
            where="decode",
            remedy="Use graph or auto.",
        )


def prepare_persistent(model: GPT2, state: DecodeState) -> None:
    """Check that the model has the step, and allocate what its blocks tell each other through."""
    check(model, state.batch)
    if state.mailboxes is None:
        size = step.words_size(state.batch, model.config.n_embd)
        state.mailboxes = model.xp.zeros(size, np.uint8)


def queue_persistent(model: GPT2, state: DecodeState) -> None:
    """Queue a step as two kernels: :func:`gpt2cupy.ops.gpt2.step.decode_step`, and sampling.

    For few rows of fp16 or bf16 on sm_90 and newer. The first kernel takes the whole GPU: one
    block on each multiprocessor, which wait for each other, so it is launched cooperatively and
    refused where they cannot all run.
    """
    config, weights = model.config, model.weights
    arrays: dict[str, Any] = {name: getattr(weights, name) for name in step.WEIGHTS}
    step.decode_step(
        state.ids,
        state.positions,
        state.slots,
        arrays,
        state.cache.k,
        state.cache.v,
        state.mailboxes,
        scale=config.attention_scale(0),
        by_layer=config.scale_attn_by_inverse_layer_idx,
        eps=config.layer_norm_epsilon,
        activation=config.activation,
        out=state.logits,
    )
    sample_next(state, state.logits, state.rows)


PERSISTENT = StepFunction(queue_persistent, prepare_persistent)
