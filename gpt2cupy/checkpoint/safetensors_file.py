"""safetensors checkpoints in Hugging Face layout: checked by the library, mapped by us.

The library's reader copies every tensor; a mapped view lets the loader copy
each byte once, straight to where it stays.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import GPT2Config
from ..errors import CheckpointError
from ..files import open_plain
from .layout import HARMLESS, HEAD, PREFIX, huggingface_keys, tensor_shape
from .stored import StoredTensor, exists, map_file, unreadable

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# GPT-2 XL's header has 80 KB. Parsed, JSON takes several times its size.
_MAX_HEADER = _MAX_INDEX = 4 << 20
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WTE = "wte.weight"
_OTHER_MODEL = "config.json and the weights must belong to the same model."


@dataclass(frozen=True)
class _Entry:
    """One tensor of a header."""

    key: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]


def read(folder: Path, config: GPT2Config) -> tuple[GPT2Config, list[StoredTensor]]:
    """The places of all tensors of the model, and the configuration as the file bears it out.

    Everything is checked here: that each tensor is there, of the configured
    shape and a supported dtype, and that there is none whose absence from the
    computation would change the result.
    """
    entries = _entries(folder)
    config = _settle_head(config, entries)
    tensors = []
    for key, name, layer, transposed in huggingface_keys(config):
        entry = entries.pop(key, None)
        if entry is None:
            raise CheckpointError(
                f"the tensor {key} is missing", where=str(folder), remedy=_OTHER_MODEL
            )
        shape = tensor_shape(config, name)
        stored = shape[::-1] if transposed else shape
        if entry.shape != stored:
            raise CheckpointError(
                f"{entry.key} has shape {list(entry.shape)}, config.json asks for {list(stored)}",
                where=str(entry.file),
                remedy=_OTHER_MODEL,
            )
        tensors.append(
            StoredTensor(name, layer, entry.file, entry.offset, _dtype(entry), stored, transposed)
        )
    for key, entry in entries.items():
        if not HARMLESS.fullmatch(key):
            raise CheckpointError(
                f"there is a tensor {entry.key}, which GPT-2 as config.json has it does not use",
                where=str(entry.file),
                remedy=f"{_OTHER_MODEL} Adapters must be merged into the weights.",
            )
    return config, tensors


def _settle_head(config: GPT2Config, entries: dict[str, _Entry]) -> GPT2Config:
    """Decide whether the embedding is the head too, as Hugging Face does.

    A configuration that says tied is followed unless both are stored and
    differ; if only the head is stored it is the embedding.
    """
    head, wte = entries.get(HEAD[0]), entries.get(_WTE)
    if not config.tie_word_embeddings or head is None:
        return config
    if wte is None:
        entries[_WTE] = entries.pop(HEAD[0])
    elif _same_values(head, wte):
        del entries[HEAD[0]]
    else:
        return dataclasses.replace(config, tie_word_embeddings=False)
    return config


def _same_values(one: _Entry, other: _Entry) -> bool:
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    first, second = (
        StoredTensor("", None, entry.file, entry.offset, _dtype(entry), entry.shape).view(
            map_file(entry.file)
        )
        for entry in (one, other)
    )
    # In parts, so that memory stays constant; float32 holds every supported dtype exactly.
    return all(
        np.array_equal(first[i : i + 1024].astype("f4"), second[i : i + 1024].astype("f4"))
        for i in range(0, len(first), 1024)
    )


def _dtype(entry: _Entry) -> np.dtype:
    if entry.dtype not in _DTYPES:
        raise CheckpointError(
            f"{entry.key} is of type {entry.dtype}, which is not supported",
            where=str(entry.file),
            remedy=f"Convert the checkpoint to one of {', '.join(_DTYPES)}.",
        )
    return _DTYPES[entry.dtype]


def _entries(folder: Path) -> dict[str, _Entry]:
    """Every tensor of the folder's files by its key, the prefix ``transformer.`` removed."""
    found: dict[str, _Entry] = {}
    for file, promised in _files(folder).items():
        header, begin = _header(file)
        if lost := promised - header.keys():
            raise CheckpointError(
                f"the tensor {min(lost)} is not in the shard that the index names",
                where=str(file),
                remedy="Index and shards must belong together; download them again.",
            )
        for key, value in header.items():
            bare = key.removeprefix(PREFIX)
            if bare in found:
                raise CheckpointError(
                    f"the tensor {bare} is stored twice",
                    where=f"{found[bare].file}, {file}",
                    remedy="Files of two checkpoints are mixed; keep those of one.",
                )
            offset = begin + value["data_offsets"][0]
            found[bare] = _Entry(key, file, offset, value["dtype"], tuple(value["shape"]))
    return found


def _files(folder: Path) -> dict[Path, set[str]]:
    """The files of the weights and the keys that an index promises in each."""
    if exists(folder / _SINGLE):
        return {folder / _SINGLE: set()}
    index = folder / _INDEX
    if not exists(index):
        convert = (
            f"from transformers import GPT2LMHeadModel as M; "
            f"M.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})"
        )
        raise CheckpointError(
            f"the folder has no {_SINGLE}",
            where=str(folder),
            remedy=f'Convert weights of another format once: python -c "{convert}"',
        )
    try:
        with open_plain(index) as file:
            places = json.loads(file.read(_MAX_INDEX))["weight_map"]
        files: dict[Path, set[str]] = {}
        for key, name in places.items():
            # A plain name: an index must not lead out of the folder.
            if Path(name).name != name:
                raise ValueError(f"{name!r} is not a file name")
            files.setdefault(folder / name, set()).add(key)
    except OSError as error:
        raise unreadable(index, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"not a valid index of shards: {error!r}"[:200],
            where=str(index),
            remedy="It is damaged; download it again.",
        ) from error
    return files


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a file that the library found valid, and where its data begins."""
    try:
        with open_plain(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER:
                raise ValueError(f"its header claims {size} bytes")
            header = json.loads(file.read(size))
        # Checks the header's form, and that the tensors fill the file without gap or overlap.
        with safe_open(path, framework="numpy"):
            pass
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not a valid safetensors file: {error}",
            where=str(path),
            remedy="It is damaged or incomplete; download or convert it again.",
        ) from error
    header.pop("__metadata__", None)
    return header, 8 + size
