"""What tests of checkpoints in PyTorch's files share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from builders import TINY, hf_tensors, write_checkpoint

from gpt2cupy import checkpoint
from gpt2cupy.weights import Weights

GELU = dataclasses.replace(TINY, activation_function="gelu", bos_token_id=None, eos_token_id=None)


def loaded(path: Path) -> dict[str, np.ndarray]:
    found = checkpoint.open(path)
    weights = Weights.from_tensors(found.config, found.tensors(finite=True), found.dtype)
    return dict(weights.items())


def folder_of(tmp_path: Path, config=TINY, dtype=np.float32) -> tuple[Weights, dict]:
    """A folder with a configuration and no file of weights yet; the weights, and their tensors."""
    weights = write_checkpoint(tmp_path, config, 0, dtype)
    (tmp_path / "model.safetensors").unlink()
    return weights, hf_tensors(config, weights)
