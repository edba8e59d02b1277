"""What a file or folder is, by its contents; errors that say what was given instead."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from ..errors import CheckpointError
from ..file_kinds import HEAD, LFS, LLMC_TOKENIZER, POINTER, kind_of
from ..files import open_plain, read_plain
from .stored import exists, unreadable

_MAX_ADAPTER = 1 << 20
_TENSORFLOW = re.compile(r"model(?:\.ckpt)?-?\d*\.(?:index|meta|data-\d+-of-\d+)")
_VARIANT = re.compile(r"(?:model|pytorch_model)\.([\w-]+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)")
# Formats that are told apart only to be named: what an error says of them, and the remedy.
_OTHERS = {
    LFS: POINTER,
    "gguf": (
        "this is a GGUF file, the format of llama.cpp, which is not read",
        "Give the checkpoint that it was made of: safetensors or pytorch_model.bin.",
    ),
    LLMC_TOKENIZER: (
        "this is a tokenizer of llm.c, not a model",
        "Give the model's file, and pass this one as tokenizer=.",
    ),
    "hdf5": (
        "this is an HDF5 file, the format of TensorFlow weights, which is not read",
        "Give the checkpoint as safetensors or pytorch_model.bin.",
    ),
    "html": (
        "this is a web page, not a model",
        "Download the file itself: on the hub, from the link beside its name.",
    ),
    "json": (
        "this is a JSON file, not a model",
        "Give the folder that holds config.json and the weights.",
    ),
    "text": ("this is a text file, not a model", "Give a folder or a file of weights."),
    "empty": ("the file is empty", "Download or copy it again."),
}


def kind(path: Path) -> str:
    """What a file is, as :mod:`gpt2cupy.file_kinds` names it.

    Raises
    ------
    CheckpointError
        If it cannot be read, or is no plain file.
    """
    try:
        with open_plain(path) as file:
            head = file.read(HEAD)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    return kind_of(head)


def refused(path: Path, found: str) -> CheckpointError:
    """The error for a file that is no checkpoint."""
    what, remedy = _OTHERS.get(
        found,
        (
            "this file is no checkpoint that is known",
            "Give a folder with config.json and weights, a file of safetensors or torch.save "
            "beside its config.json, or an llm.c or nanoGPT model file.",
        ),
    )
    return CheckpointError(what, where=str(path), remedy=remedy)


def refuse_others(path: Path) -> str:
    """What a file is; raise for what is known and holds no tensors, as a pointer of git-lfs."""
    found = kind(path)
    if found in _OTHERS:
        raise refused(path, found)
    return found


def _refuse_adapter(folder: Path) -> None:
    """Raise if the folder is an adapter's, naming the model that it is for."""
    path = folder / "adapter_config.json"
    if not exists(path):
        return
    try:
        base = json.loads(read_plain(path, _MAX_ADAPTER))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        base = None
    base = base if isinstance(base, str) and base else "gpt2"
    raise CheckpointError(
        "this is the folder of an adapter, not of a model",
        where=str(folder),
        remedy=f"Load the model with it: gpt2cupy.load({base!r}, adapter={str(folder)!r}).",
    )


def refuse_folder(folder: Path) -> None:
    """Raise if a folder without config.json is something else that is known."""
    names = _names(folder)
    _refuse_adapter(folder)
    if "hparams.json" in names or any(map(_TENSORFLOW.fullmatch, names)):
        raise CheckpointError(
            "this is a TensorFlow checkpoint, as OpenAI published and gpt-2-simple writes, "
            "which is not read",
            where=str(folder),
            remedy="OpenAI's models are on the hub: gpt2, gpt2-medium, gpt2-large, gpt2-xl. One of "
            "your own has to be converted to Hugging Face layout.",
        )
    if any(name.endswith(".gguf") for name in names):
        raise refused(folder, "gguf")


def no_weights(folder: Path, variant: str | None) -> CheckpointError:
    """The error for a folder with a config.json and no weights that are read."""
    names = _names(folder)
    _refuse_adapter(folder)
    single = "model.safetensors" if variant is None else f"model.{variant}.safetensors"
    what = f"the folder has no {single} and no pytorch_model.bin"
    if variant is not None:
        what = f"the folder has no weights of the variant {variant!r}"
    others = sorted({found[1] for name in names if (found := _VARIANT.fullmatch(name))})
    if others:
        remedy = f"It has another variant: pass variant={others[0]!r}."
    elif variant is not None:
        remedy = "Leave variant out."
    else:
        present = [name for name in names if name.endswith((".h5", ".msgpack", ".gguf", ".onnx"))]
        had = f"It has {present[0]}, which is not read. " if present else ""
        remedy = f"{had}Put the weights there as safetensors or pytorch_model.bin."
    return CheckpointError(what, where=str(folder), remedy=remedy)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unreadable(folder, error) from error
