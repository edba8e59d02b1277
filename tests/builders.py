"""Small models and checkpoints that tests write themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gpt2cupy import GPT2Config
from gpt2cupy.checkpoint.layout import HEAD, LAYER, PREFIX, WHOLE
from gpt2cupy.weights import Weights

TINY = GPT2Config(
    vocab_size=211, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)


def hf_tensors(config: GPT2Config, weights: Weights) -> dict[str, np.ndarray]:
    """Host weights under Hugging Face's names and in its layout."""
    tensors = {}
    for key, name in WHOLE.items():
        tensors[PREFIX + key] = getattr(weights, name)
    tensors[PREFIX + "wte.weight"] = weights.wte[: config.vocab_size]
    for layer in range(config.n_layer):
        for key, (name, transposed) in LAYER.items():
            array = getattr(weights, name)[layer]
            tensors[f"{PREFIX}h.{layer}.{key}"] = array.T if transposed else array
    if not config.tie_word_embeddings:
        tensors[HEAD[0]] = weights.lm_head[: config.vocab_size]
    dtype = weights.dtype
    return {key: np.ascontiguousarray(a.astype(dtype)) for key, a in tensors.items()}


def write_checkpoint(
    folder: Path,
    config: GPT2Config,
    seed: int = 0,
    dtype: Any = np.float32,
    *,
    prefix: bool = True,
    weights: Weights | None = None,
) -> Weights:
    """Write config.json and model.safetensors; returns the weights (random ones by default)."""
    weights = weights or Weights.random(config, seed, dtype)
    tensors = hf_tensors(config, weights)
    if not prefix:
        tensors = {key.removeprefix(PREFIX): array for key, array in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return weights


def with_outliers(config: GPT2Config, weights: Weights, size: float = 2000.0) -> Weights:
    """Scale a few columns of the embeddings so that the residual stream reaches thousands."""
    for column in (1, config.n_embd // 3, config.n_embd - 2):
        table = weights.wpe[:, column].astype(np.float32)
        weights.wpe[:, column] = table * (size / np.abs(table).max())
    return weights


def widened(config: GPT2Config, weights: Weights) -> Weights:
    """The same values in float64: what the oracle computes with."""
    wide = Weights.empty(config, np.float64)
    for name, array in weights.items():
        getattr(wide, name)[...] = array.astype(np.float64)
    return wide


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
