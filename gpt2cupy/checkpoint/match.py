"""From the tensors that a file has to those that the model needs: names, shapes, the head."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..config import GPT2Config
from ..errors import CheckpointError
from .entries import Entry
from .layout import BUFFERS, HEAD, OTHER_TASKS, PREFIX, WRAPPERS, huggingface_keys, tensor_shape
from .stored import StoredTensor, map_file

_WTE = "wte.weight"
_OTHER_MODEL = "Configuration and weights must belong to the same model."


def match(
    entries: Iterable[Entry],
    config: GPT2Config,
    where: Path,
    *,
    linear: bool = False,
    biases: bool = True,
) -> tuple[GPT2Config, list[StoredTensor]]:
    """The places of all tensors of the model, and the configuration as the files bear it out.

    Everything is checked here: that each tensor is there, of the configured
    shape and a supported dtype, and that there is none whose absence from the
    computation would change the result.

    Parameters
    ----------
    entries : iterable of Entry
    config : GPT2Config
    where : Path
        What errors name.
    linear : bool
        Matrices are [out, in], as nn.Linear has them; else [in, out], as Conv1D.
    biases : bool
        Every bias must be there; else missing ones are zero.
    """
    found = _by_bare_key(entries)
    config = _settle_head(config, found)
    tensors = []
    for key, name, layer, conv1d in huggingface_keys(config):
        entry = found.pop(key, None)
        if entry is None:
            if not biases and key.endswith(".bias"):
                continue
            raise CheckpointError(
                f"the tensor {key} is missing", where=str(where), remedy=_OTHER_MODEL
            )
        in_out = conv1d and not linear
        shape = tensor_shape(config, name)[:: -1 if in_out else 1]
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.key} has shape {list(entry.shape)}, the configuration asks for "
                f"{list(shape)}",
                where=str(entry.file),
                remedy=_OTHER_MODEL,
            )
        tensors.append(stored(entry, name, layer, in_out=in_out))
    leave_out(found, where)
    return config, tensors


def stored(entry: Entry, name: str, layer: int | None, *, in_out: bool = False) -> StoredTensor:
    """Where the tensor lies; in_out says that the entry's own shape is [in, out]."""
    turned = entry.transposed
    shape = entry.shape[::-1] if turned else entry.shape
    dtype = entry.numpy_dtype
    return StoredTensor(name, layer, entry.file, entry.offset, dtype, shape, turned != in_out)


def _by_bare_key(entries: Iterable[Entry]) -> dict[str, Entry]:
    """Entries by key, without what wrappers put before every key and without ``transformer.``."""
    given = list(entries)
    keys = [entry.key for entry in given]
    while wrapper := _wrapper(keys):
        keys = [key.removeprefix(wrapper) for key in keys]
    found: dict[str, Entry] = {}
    for key, entry in zip(keys, given, strict=True):
        bare = key.removeprefix(PREFIX)
        if bare in found:
            raise CheckpointError(
                f"the tensor {bare} is stored twice",
                where=f"{found[bare].file}, {entry.file}",
                remedy="Files of two checkpoints are mixed; keep those of one.",
            )
        found[bare] = entry
    return found


def _wrapper(keys: list[str]) -> str | None:
    """A prefix that every key of the model has; heads of a wrapper's own need not."""
    own = [key for key in keys if not OTHER_TASKS.fullmatch(key)]
    for wrapper in WRAPPERS if own else ():
        if all(key.startswith(wrapper) for key in own):
            return wrapper
    return None


def leave_out(rest: Mapping[str, Entry], where: Path) -> None:
    """Judge the tensors that nothing asked for; name once those of other tasks."""
    named = []
    for key, entry in rest.items():
        if BUFFERS.fullmatch(key):
            continue
        if not OTHER_TASKS.fullmatch(key):
            raise CheckpointError(
                f"there is a tensor {entry.key}, which a GPT-2 of this configuration does not use",
                where=str(entry.file),
                remedy=f"{_OTHER_MODEL} Adapters are separate files: pass adapter=.",
            )
        named.append(entry.key)
    if named:
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        warnings.warn(
            f"left out, since they do not enter the logits: {', '.join(named[:5])}{more} ({where})",
            RuntimeWarning,
            stacklevel=6,
        )


def _settle_head(config: GPT2Config, entries: dict[str, Entry]) -> GPT2Config:
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


def _same_values(one: Entry, other: Entry) -> bool:
    if one.shape != other.shape or len(one.shape) != 2:
        return False
    if dataclasses.replace(one, key=other.key) == other:
        return True  # torch.save stores a shared tensor once
    first, second = (stored(entry, "", None).view(map_file(entry.file)) for entry in (one, other))
    # In parts, so that memory stays constant; float64 holds every supported dtype exactly.
    return all(
        np.array_equal(first[i : i + 1024].astype("f8"), second[i : i + 1024].astype("f8"))
        for i in range(0, len(first), 1024)
    )
