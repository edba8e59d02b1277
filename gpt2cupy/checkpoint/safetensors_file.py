"""safetensors checkpoints in Hugging Face layout: checked by the library, mapped by us.

The library's reader copies every tensor; a mapped view lets the loader copy
each byte once, straight to where it stays.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import GPT2Config
from ..errors import CheckpointError
from ..weights import weight_shapes
from .layout import HEAD, LAYER, PREFIX, WHOLE

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


def _file(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if path.is_file():
        return path
    raise CheckpointError(
        "the folder has no model.safetensors",
        where=str(folder),
        remedy="Convert other weights once with transformers: "
        "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder).",
    )


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a file that the library found valid, and where the data begins."""
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"not a valid safetensors file: {error}",
            where=str(path),
            remedy="It is damaged or incomplete; download or convert it again.",
        ) from error
    header.pop("__metadata__", None)
    return header, 8 + size


def stored_dtype(folder: Path) -> np.dtype:
    """The dtype of most of the file's bytes."""
    path = _file(folder)
    sizes: dict[str, int] = {}
    for entry in _header(path)[0].values():
        first, last = entry["data_offsets"]
        sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + last - first
    return _dtype(max(sizes, key=lambda name: sizes[name], default="F32"), path)


def _dtype(name: str, path: Path) -> np.dtype:
    if name not in _DTYPES:
        raise CheckpointError(
            f"tensors of type {name} are not supported",
            where=str(path),
            remedy=f"Convert the checkpoint to one of {', '.join(_DTYPES)}.",
        )
    return _DTYPES[name]


def tensors(folder: Path, config: GPT2Config) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """(name, layer, array) of every tensor of the model; arrays are views of the mapped file."""
    path = _file(folder)
    header, begin = _header(path)
    data = np.memmap(path, np.uint8, "r", offset=0)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in header) else ""
    shapes = weight_shapes(config)

    def view(key: str, name: str, layer: int | None, transposed: bool) -> np.ndarray:
        if key not in header:
            raise CheckpointError(
                f"the tensor {key} is missing",
                where=str(path),
                remedy="config.json and the weights must belong to the same model.",
            )
        entry = header[key]
        shape = shapes[name][1:] if layer is not None else shapes[name]
        if name in ("wte", "lm_head"):
            shape = (config.vocab_size, config.n_embd)
        stored = shape[::-1] if transposed else shape
        if tuple(entry["shape"]) != stored:
            raise CheckpointError(
                f"{key} has shape {entry['shape']}, config.json asks for {list(stored)}",
                where=str(path),
                remedy="config.json and the weights must belong to the same model.",
            )
        first = begin + entry["data_offsets"][0]
        dtype = _dtype(entry["dtype"], path)
        array = data[first : first + math.prod(stored) * dtype.itemsize].view(dtype)
        array = array.reshape(stored)
        return array.T if transposed else array

    for key, name in WHOLE.items():
        yield name, None, view(prefix + key, name, None, False)
    for layer in range(config.n_layer):
        for key, (name, transposed) in LAYER.items():
            yield name, layer, view(f"{prefix}h.{layer}.{key}", name, layer, transposed)
    if not config.tie_word_embeddings:
        yield HEAD[1], None, view(HEAD[0], HEAD[1], None, False)
