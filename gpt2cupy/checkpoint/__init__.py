"""Checkpoints: from a name to a configuration and mapped tensors in the resident layout's terms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..config import GPT2Config
from ..errors import InputError, kind_of
from . import llmc_file, safetensors_file
from .resolve import resolve
from .stored import StoredTensor, check_finite, views

__all__ = ["Checkpoint", "StoredTensor", "check_finite", "open"]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found and checked but for its values, which are mapped, not loaded.

    Attributes
    ----------
    name : str
        As the user gave it.
    path : Path
        Folder of the files, or the llm.c file.
    config : GPT2Config
        With ``tie_word_embeddings`` as the stored tensors have it.
    stored : tuple of StoredTensor
        Where every tensor of the model lies.
    """

    name: str
    path: Path
    config: GPT2Config
    stored: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> np.dtype:
        """What most of the bytes are stored in: float32, float16 or bfloat16."""
        sizes: dict[np.dtype, int] = {}
        for tensor in self.stored:
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors in the files."""
        return sum(tensor.nbytes for tensor in self.stored)

    def tensors(self, *, finite: bool = False) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(name, layer, array) for :meth:`Weights.from_tensors`.

        Arrays are read-only views of the mapped files in rows [out, in]; those
        stored as [in, out] come as transposed views.

        Parameters
        ----------
        finite : bool
            Check every array for NaN and infinite values before it is yielded,
            which reads it all.

        Raises
        ------
        CheckpointError
            If a file cannot be mapped, or a value is not finite.
        """
        for name, layer, array in views(self.stored):
            if finite:
                check_finite(name, layer, array)
            yield name, layer, array


def open(name_or_path: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Find a checkpoint and check its configuration and the headers of its files.

    Parameters
    ----------
    name_or_path : str or path
        "shakespeare", an alias (gpt2, gpt2-medium, gpt2-large, gpt2-xl,
        distilgpt2), a hub id, a folder in Hugging Face layout, or an llm.c file.
    revision : str, optional
        Branch, tag or commit of a hub id.

    Raises
    ------
    CheckpointError
        If it cannot be found, read or trusted.
    InputError
        If the name is not a string or path.
    ConfigError
        If it is not a GPT-2 that this package runs.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise InputError(
            f"a checkpoint cannot be {kind_of(name_or_path)}",
            where="name_or_path",
            remedy="Pass a name, a hub id or a path.",
        )
    name = os.fsdecode(name_or_path)
    path = resolve(name, revision)
    if path.is_dir():
        config, tensors = safetensors_file.read(path, GPT2Config.from_json(path / "config.json"))
    else:
        config, tensors = llmc_file.read(path)
    return Checkpoint(name, path, config, tuple(tensors))
