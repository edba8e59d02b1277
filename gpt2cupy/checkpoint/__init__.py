"""Checkpoints: from a name to a configuration and mapped tensors in the resident layout's terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import GPT2Config
from . import safetensors_file
from .resolve import resolve

__all__ = ["Checkpoint", "open"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and whose header was read; its tensors are mapped, not loaded.

    Attributes
    ----------
    name : str
        As the user gave it.
    path : Path
        Folder of the files.
    config : GPT2Config
    dtype : numpy.dtype
        What most of its bytes are stored in.
    """

    name: str
    path: Path
    config: GPT2Config
    dtype: np.dtype

    def tensors(self) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(name, layer, array) for :meth:`Weights.from_tensors`: mapped views in rows [out, in]."""
        return safetensors_file.tensors(self.path, self.config)


def open(name_or_path: str, *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and read its configuration and header.

    Parameters
    ----------
    name_or_path : str
        "shakespeare", an alias, a hub id, or a folder in Hugging Face layout.
    revision : str, optional
        Branch, tag or commit of a hub id.

    Raises
    ------
    CheckpointError
        If it cannot be found or read.
    ConfigError
        If it is not a GPT-2 that this package runs.
    """
    path = resolve(name_or_path, revision)
    config = GPT2Config.from_json(path / "config.json")
    return Checkpoint(name_or_path, path, config, safetensors_file.stored_dtype(path))
