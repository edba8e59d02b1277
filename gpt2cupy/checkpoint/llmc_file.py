"""llm.c's checkpoints: 256 numbers, then every parameter in a fixed order."""

from __future__ import annotations

import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from ..config import GPT2Config
from ..errors import CheckpointError, ConfigError
from ..file_kinds import LLMC_MAGIC
from ..files import open_plain
from .layout import LLMC_ORDER, is_stacked, tensor_shape
from .stored import StoredTensor, unreadable

_HEADER_BYTES = 256 * 4
_DTYPES = {3: np.dtype(np.float32), 5: np.dtype(ml_dtypes.bfloat16)}


def read(path: Path) -> tuple[GPT2Config, list[StoredTensor]]:
    """The configuration and the places of all tensors of a version 3 or 5 file.

    llm.c has GPT-2 in one form only: tied embeddings, GELU by tanh, 4 x C inner
    channels. Its embedding is padded to ``Vp`` rows, which are left out here.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(_HEADER_BYTES)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    # Any file may be given: a short one need not be a whole number of integers.
    header = np.frombuffer(data[: len(data) // 4 * 4], "<i4")
    if len(header) < 8 or header[0] != LLMC_MAGIC:
        raise CheckpointError(
            "this file is no checkpoint of llm.c",
            where=str(path),
            remedy="Give a folder with config.json and safetensors, or an llm.c model file.",
        )
    version, context, vocab, layers, heads, channels, padded = header[1:8].tolist()
    if version not in _DTYPES:
        raise CheckpointError(
            f"version {version} of llm.c's format is not supported",
            where=str(path),
            remedy="Write it again with a current llm.c: version 3 (fp32) or 5 (bf16).",
        )
    try:
        config = GPT2Config(
            vocab_size=vocab,
            n_positions=context,
            n_embd=channels,
            n_layer=layers,
            n_head=heads,
        )
    except ConfigError as error:
        raise ConfigError(error.what, where=str(path), remedy="The header is damaged.") from None

    dtype = _DTYPES[version]
    places, end = {}, _HEADER_BYTES
    for name in LLMC_ORDER:
        places[name] = end
        shape = (padded, channels) if name == "wte" else tensor_shape(config, name)
        end += math.prod(shape) * dtype.itemsize * (layers if is_stacked(name) else 1)
    if padded < vocab or end != size:
        raise CheckpointError(
            f"the file has {size} bytes, its header asks for {end}",
            where=str(path),
            remedy="It is damaged or incomplete; copy or write it again.",
        )
    tensors = []
    for name in LLMC_ORDER:
        shape = tensor_shape(config, name)
        step = math.prod(shape) * dtype.itemsize
        for layer in range(layers) if is_stacked(name) else [None]:
            offset = places[name] + step * (layer or 0)
            tensors.append(StoredTensor(name, layer, path, offset, dtype, shape))
    return config, tensors
