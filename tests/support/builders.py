"""Small models and checkpoints that tests write themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gpt2cupy import GPT2, GPT2Config
from gpt2cupy.checkpoint.layout import HEAD, LAYER, PREFIX, WHOLE
from gpt2cupy.loading import place, weight_tensors
from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT
from gpt2cupy.validate.runs import widened as widened
from gpt2cupy.weights import Weights

TINY = GPT2Config(
    vocab_size=211, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
)


def hf_tensors(config: GPT2Config, weights: Weights) -> dict[str, np.ndarray]:
    """Host weights under Hugging Face's names and in its layout."""
    tensors = {}
    for key, name in WHOLE.items():
        tensors[PREFIX + key] = getattr(weights, name)
    tensors[PREFIX + "wte.weight"] = weights.wte[: config.vocab_size]
    for layer in range(config.n_layer):
        for key, (name, transposed) in LAYER.items():
            array = getattr(weights, name)[layer]
            tensors[f"{PREFIX}h.{layer}.{key}"] = array.T if transposed else array
    if not config.tie_word_embeddings:
        tensors[HEAD[0]] = weights.lm_head[: config.vocab_size]
    dtype = weights.dtype
    return {key: np.ascontiguousarray(a.astype(dtype)) for key, a in tensors.items()}


def write_checkpoint(
    folder: Path,
    config: GPT2Config,
    seed: int = 0,
    dtype: Any = np.float32,
    *,
    prefix: bool = True,
    shards: int = 1,
    weights: Weights | None = None,
) -> Weights:
    """Write config.json and safetensors; returns the weights (random ones by default)."""
    weights = weights or Weights.random(config, seed, dtype)
    tensors = hf_tensors(config, weights)
    if not prefix:
        tensors = {key.removeprefix(PREFIX): array for key, array in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder, tensors, shards)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return weights


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    """Write model.safetensors, or several shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    places = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        save_file(part, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(part, name)
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_llmc(path: Path, config: GPT2Config, weights: Weights) -> None:
    """Write llm.c's version 3 (float32) or 5 (bfloat16): its order, spelled out once more."""
    order = [
        "ln1_w",
        "ln1_b",
        "qkv_w",
        "qkv_b",
        "proj_w",
        "proj_b",
        "ln2_w",
        "ln2_b",
        "fc_w",
        "fc_b",
        "out_w",
        "out_b",
    ]
    header = np.zeros(256, "<i4")
    header[:8] = (
        *(20240326, 3 if weights.dtype == np.float32 else 5),
        *(config.n_positions, config.vocab_size, config.n_layer, config.n_head, config.n_embd),
        config.padded_vocab_size,
    )
    arrays = [getattr(weights, name) for name in ["wte", "wpe", *order, "lnf_w", "lnf_b"]]
    path.write_bytes(header.tobytes() + b"".join(a.astype(weights.dtype).tobytes() for a in arrays))


def write_llmc_tokenizer(path: Path, tokens: list[bytes], end: int, version: int = 2) -> None:
    """Write llm.c's gpt2_tokenizer.bin."""
    header = np.zeros(256, "<i4")
    header[:4] = 20240328, version, len(tokens), end if version == 2 else 0
    path.write_bytes(header.tobytes() + b"".join(bytes([len(t)]) + t for t in tokens))


def write_bpe(
    folder: Path,
    vocab: dict[str, int],
    merges: list[tuple[str, str]],
    names: tuple[str, str] = ("vocab.json", "merges.txt"),
) -> None:
    """Write a vocabulary and merges as OpenAI and Hugging Face do."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / names[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokenizer_json(vocab: dict[str, int], merges: list, /, **changes) -> dict:
    """As the tokenizers library writes GPT-2's; changes replace parts, or parts of the model."""
    model = {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocab, "merges": merges}
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": vocab[END_OF_TEXT], "content": END_OF_TEXT, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": model,
    }
    for name, value in changes.items():
        (whole if name in whole else model)[name] = value
    return whole


def small_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A small vocabulary in GPT-2's order (bytes, merges, end of text) and its merges."""
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("a", "a"), ("aa", "aa"), ("Ã", "©")]
    tokens = [*BYTE_SYMBOLS, *(left + right for left, right in merges), END_OF_TEXT]
    return {token: id_ for id_, token in enumerate(tokens)}, merges


def with_outliers(config: GPT2Config, weights: Weights, size: float = 2000.0) -> Weights:
    """Scale a few columns of the embeddings so that the residual stream reaches thousands."""
    for column in (1, config.n_embd // 3, config.n_embd - 2):
        table = weights.wpe[:, column].astype(np.float32)
        weights.wpe[:, column] = table * (size / np.abs(table).max())
    return weights


def copied(config: GPT2Config, weights: Weights) -> Weights:
    """The same values in memory of their own, to be changed."""
    copy = Weights.empty(config, weights.dtype)
    for name, array in weights.items():
        getattr(copy, name)[...] = array
    return copy


def host(array: Any) -> np.ndarray:
    """The values of an array of either kind."""
    return array.get() if hasattr(array, "get") else array


def model_on(xp: Any, config: GPT2Config, weights: Weights) -> GPT2:
    """The model on the CPU for NumPy, on the current GPU for CuPy."""
    tensors = weight_tensors(config, weights)
    kind, index = ("cpu", 0) if xp is np else ("cuda", xp.cuda.runtime.getDevice())
    placed = place(config, tensors, weights.dtype, kind, index)
    return GPT2(config, placed)


BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
