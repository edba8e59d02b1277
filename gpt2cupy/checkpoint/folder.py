"""Folders in Hugging Face layout: which files hold the weights, and what they hold."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, InputError
from ..file_kinds import SAFETENSORS, TORCH
from ..files import open_plain
from . import recognise, safetensors_file, torch_file
from .entries import Entry
from .stored import exists, unreadable

# Parsed, JSON takes several times its size.
_MAX_INDEX = 4 << 20
_VARIANT = re.compile(r"[\w-]{1,40}", re.ASCII)
# What trainers call the weights inside of what they save.
_NESTED = ("state_dict", "model_state_dict", "model", "module")


def read_state_dict(path: Path) -> list[Entry]:
    """Every tensor of a file of ``torch.save``, also where a trainer put them one level down."""
    file = torch_file.read(path)
    value = file.value
    if isinstance(value, dict):
        for inner in (value, *(value.get(name) for name in _NESTED)):
            if isinstance(inner, dict) and (found := file.entries(inner)):
                return list(found.values())
    raise CheckpointError(
        "the file has no tensors by name",
        where=str(path),
        remedy="Save the model's state dict: torch.save(model.state_dict(), path).",
    )


@dataclass(frozen=True)
class Form:
    """A format of weights: one file, or shards with an index."""

    single: str
    shards: str
    index: str
    read: Callable[[Path], list[Entry]]


def forms(variant: str | None) -> tuple[Form, Form]:
    """The two formats with the names that transformers gives a variant; the first is preferred."""
    if variant is not None and (not isinstance(variant, str) or not _VARIANT.fullmatch(variant)):
        raise InputError(
            f"no files have the variant {variant!r}"[:200],
            where="variant",
            remedy='Pass the part between "model." and ".safetensors", as "fp16".',
        )
    dot = "" if variant is None else f".{variant}"
    return (
        Form(
            f"model{dot}.safetensors",
            f"model{dot}-*.safetensors",
            f"model.safetensors.index{dot}.json",
            safetensors_file.read,
        ),
        Form(
            f"pytorch_model{dot}.bin",
            f"pytorch_model{dot}-*.bin",
            f"pytorch_model.bin.index{dot}.json",
            read_state_dict,
        ),
    )


def has_weights(folder: Path, form: Form) -> bool:
    """Whether the folder has files of that format."""
    return exists(folder / form.single) or exists(folder / form.index)


def read_file(path: Path, form: Form) -> list[Entry]:
    """Every tensor of a file, by what it holds: some are misnamed, some are no weights."""
    readers = {SAFETENSORS: safetensors_file.read, TORCH: read_state_dict}
    return readers.get(recognise.refuse_others(path), form.read)(path)


def read(folder: Path, variant: str | None) -> Iterator[Entry]:
    """Every tensor of the folder's weights.

    Raises
    ------
    CheckpointError
        If there are none, or a file is damaged.
    """
    for form in forms(variant):
        if exists(folder / form.single):
            yield from read_file(folder / form.single, form)
            return
        if exists(folder / form.index):
            for file, promised in _shards(folder / form.index).items():
                entries = read_file(file, form)
                if lost := promised - {entry.key for entry in entries}:
                    raise CheckpointError(
                        f"the tensor {min(lost)} is not in the shard that the index names",
                        where=str(file),
                        remedy="Index and shards must belong together; download them again.",
                    )
                yield from entries
            return
    raise recognise.no_weights(folder, variant)


def _shards(index: Path) -> dict[Path, set[str]]:
    """The files of the weights and the keys that an index promises in each."""
    try:
        with open_plain(index) as file:
            places = json.loads(file.read(_MAX_INDEX))["weight_map"]
        files: dict[Path, set[str]] = {}
        for key, name in places.items():
            # A plain name: an index must not lead out of the folder.
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file name")
            files.setdefault(index.parent / name, set()).add(key)
    except OSError as error:
        raise unreadable(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"not a valid index of shards: {error!r}"[:200],
            where=str(index),
            remedy="It is damaged; download it again.",
        ) from error
    return files
