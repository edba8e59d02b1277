"""Checkpoints: from a name to a configuration and mapped tensors in the resident layout's terms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..config import GPT2Config
from ..errors import CheckpointError, InputError, kind_of
from ..file_kinds import LLMC, SAFETENSORS, TORCH
from . import adapter as adapters
from . import folder, llmc_file, nanogpt, recognise, safetensors_file, torch_file
from .folder import forms
from .match import match
from .resolve import resolve, resolve_adapter
from .stored import StoredTensor, check_finite, exists, views

__all__ = ["Checkpoint", "StoredTensor", "check_finite", "open"]

_NANOGPT = "ckpt.pt"  # what train.py writes into its output folder


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
    pairs : mapping
        The factors of an adapter, which :meth:`tensors` adds, by name and layer.
    """

    name: str
    path: Path
    config: GPT2Config
    stored: tuple[StoredTensor, ...]
    pairs: adapters.Pairs = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype:
        """What most of the bytes are stored in: float32 (float64 too), float16 or bfloat16."""
        sizes: dict[np.dtype, int] = {}
        for tensor in self.stored:
            sizes[tensor.read_dtype] = sizes.get(tensor.read_dtype, 0) + tensor.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def nbytes(self) -> int:
        """Bytes of the model's tensors in the files."""
        return sum(tensor.nbytes for tensor in self.stored)

    def tensors(self, *, finite: bool = False) -> Iterator[tuple[str, int | None, np.ndarray]]:
        """(name, layer, array) for :meth:`Weights.from_tensors`.

        Arrays are read-only views of the mapped files in rows [out, in]; those
        stored as [in, out] come as transposed views, those in float64 rounded to
        float32, and those that an adapter changes as new float32 arrays.

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
        for name, layer, array in adapters.merged(views(self.stored), self.pairs):
            if finite:
                check_finite(name, layer, array)
            yield name, layer, array


def open(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    variant: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Find a checkpoint and check its configuration and the headers of its files.

    Parameters
    ----------
    name_or_path : str or path
        "shakespeare", an alias (gpt2, gpt2-medium, gpt2-large, gpt2-xl,
        distilgpt2), a hub id, a folder in Hugging Face layout, a file of
        safetensors or torch.save with its config.json beside it, nanoGPT's
        ckpt.pt, or an llm.c file.
    revision : str, optional
        Branch, tag or commit of a hub id.
    variant : str, optional
        "fp16" takes ``model.fp16.safetensors`` in place of ``model.safetensors``.
    adapter : str or path, optional
        Folder or hub id of a LoRA adapter of PEFT, which is merged into the weights.

    Raises
    ------
    CheckpointError
        If it cannot be found, read or trusted.
    InputError
        If the name is not a string or path.
    ConfigError
        If it is not a GPT-2 that this package runs.
    """
    forms(variant)
    name = _as_name(name_or_path, "a checkpoint", "name_or_path")
    path, config, tensors = _read(resolve(name, revision, variant), variant)
    pairs: adapters.Pairs = {}
    if adapter is not None:
        place = resolve_adapter(_as_name(adapter, "an adapter", "adapter"))
        config, tensors, pairs = adapters.read(place, config, tensors)
    return Checkpoint(name, path, config, tuple(tensors), pairs)


def _as_name(given: object, noun: str, where: str) -> str:
    if not isinstance(given, str | os.PathLike):
        raise InputError(
            f"{noun} cannot be {kind_of(given)}",
            where=where,
            remedy="Pass a name, a hub id or a path.",
        )
    return os.fsdecode(given)


def _read(path: Path, variant: str | None) -> tuple[Path, GPT2Config, list[StoredTensor]]:
    """The folder or file that tokenizer and remedies refer to, and what it holds."""
    if path.is_dir():
        if not exists(path / "config.json"):
            recognise.refuse_folder(path)
            if exists(path / _NANOGPT):
                return path, *_read(path / _NANOGPT, variant)[1:]
        config = GPT2Config.from_json(path / "config.json")
        return path, *match(folder.read(path, variant), config, path)
    if variant is not None:
        raise InputError(
            "variant means nothing for a file", where="variant", remedy="Leave it out."
        )
    found = recognise.kind(path)
    if found == LLMC:
        return path, *llmc_file.read(path)
    if found not in (TORCH, SAFETENSORS):
        raise recognise.refused(path, found)
    if found == TORCH:
        file = torch_file.read(path)
        if nanogpt.is_nanogpt(file.value):
            return path, *nanogpt.read(file)
    beside = path.parent / "config.json"
    if not exists(beside):
        raise CheckpointError(
            "the file of weights has no config.json beside it",
            where=str(path),
            remedy="Copy the config.json of its model into the same folder.",
        )
    read = safetensors_file.read if found == SAFETENSORS else folder.read_state_dict
    return path.parent, *match(read(path), GPT2Config.from_json(beside), path)
