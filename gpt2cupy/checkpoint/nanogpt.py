"""Checkpoints of nanoGPT (``ckpt.pt``): the sizes and the tensors of one torch.save."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..config import GPT2Config
from ..errors import CheckpointError, ConfigError
from .match import match
from .stored import StoredTensor
from .torch_file import TorchFile

# nanoGPT's name -> GPT2Config's
_SIZES = {
    "block_size": "n_positions",
    "vocab_size": "vocab_size",
    "n_embd": "n_embd",
    "n_layer": "n_layer",
    "n_head": "n_head",
}
# nanoGPT trains GPT-2's vocabulary with rows to spare, which no text ever has.
_PADDED, _GPT2_VOCABULARY = 50304, 50257
_EMBEDDINGS = ("wte.weight", "lm_head.weight")


def is_nanogpt(value: Any) -> bool:
    """Whether what was saved has nanoGPT's two parts."""
    names = ("model", "model_args")
    return isinstance(value, dict) and all(isinstance(value.get(name), dict) for name in names)


def read(file: TorchFile) -> tuple[GPT2Config, list[StoredTensor]]:
    """The configuration, and the places of all tensors of the model.

    nanoGPT has GPT-2 in one form: matrices [out, in] (``nn.Linear``), tied
    embeddings, GELU by erf, layer norm with 1e-5, 4 x C inner channels, and
    with ``bias=False`` no bias in any layer.
    """
    arguments: Mapping[Any, Any] = file.value["model_args"]
    try:
        sizes = {ours: arguments[theirs] for theirs, ours in _SIZES.items()}
        config = GPT2Config(**sizes, activation_function="gelu")
    except (KeyError, ConfigError) as error:
        what = error.what if isinstance(error, ConfigError) else f"there is no {error}"
        raise ConfigError(
            f"model_args is not nanoGPT's: {what}",
            where=str(file.path),
            remedy="Give a checkpoint that nanoGPT's train.py wrote.",
        ) from None
    entries = list(file.entries(file.value["model"]).values())
    if not entries:
        raise CheckpointError(
            "the checkpoint has no tensors",
            where=str(file.path),
            remedy="Give a checkpoint that nanoGPT's train.py wrote.",
        )
    if config.vocab_size == _PADDED:
        config = dataclasses.replace(
            config, vocab_size=_GPT2_VOCABULARY, bos_token_id=50256, eos_token_id=50256
        )
        entries = [
            dataclasses.replace(entry, shape=(_GPT2_VOCABULARY, *entry.shape[1:]))
            if entry.key.endswith(_EMBEDDINGS) and entry.shape[:1] == (_PADDED,)
            else entry
            for entry in entries
        ]
    biases = arguments.get("bias", True) is not False
    return match(entries, config, file.path, linear=True, biases=biases)
