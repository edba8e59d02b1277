"""The decode step as one kernel that stays on the GPU until the logits are there."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..model import GPT2
from ..ops.gpt2 import step
from ..quantize import QuantizedMatrix
from .state import DecodeState
from .step import sample_next


def why_not(model: GPT2, rows: int) -> str | None:
    """Why a model has no persistent step for so many rows, on its device; None if it has."""
    if model.xp is np:
        return "it needs a GPU"
    if model.batch_invariant:
        return "a batch-invariant model needs one order of sums for any number of rows"
    if model.gemv != "ours":
        return f"it has GEMVs of its own, and this model's are {model.gemv}'s"
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


def persistent_step(model: GPT2, state: DecodeState) -> None:
    """Queue one step as two kernels: :func:`gpt2cupy.ops.gpt2.step.decode_step`, and sampling.

    For few rows of fp16 or bf16 on sm_90 and newer. The first kernel takes the whole GPU: one
    block on each multiprocessor, which wait for each other, so it is launched cooperatively and
    refused where they cannot all run.

    Raises
    ------
    InputError
        If the model has no such step for the rows of ``state``.
    """
    forward(model, state)
    sample_next(state, state.logits, state.rows)


def forward(model: GPT2, state: DecodeState, *, together: bool = False) -> None:
    """Queue the first of the two, with ``together`` for rows of one text."""
    check(model, state.batch)
    config, weights = model.config, model.weights
    if state.mailboxes is None:
        state.mailboxes = model.xp.zeros(step.mailboxes_size(state.batch, config.n_embd), np.uint8)
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
        together=together,
    )
