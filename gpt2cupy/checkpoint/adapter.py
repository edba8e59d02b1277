"""LoRA adapters of PEFT, merged into the weights as they are loaded.

A matrix W [out, in] becomes W + scale * B A with A [r, in] and B [out, r]
(Hu et al. 2021, https://arxiv.org/abs/2106.09685); scale is alpha / r, or
alpha / sqrt(r) with ``use_rslora``. Sums are in float32. Every option that
would give other weights is refused by its name.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..errors import CheckpointError
from ..files import read_plain
from . import folder, recognise, safetensors_file
from .entries import Entry
from .layout import HEAD, PREFIX, huggingface_keys, tensor_shape
from .match import leave_out, stored
from .resolve import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from .stored import StoredTensor, exists, unreadable, views

_MAX_CONFIG = 1 << 20
_MERGED = "Merge it in PEFT with merge_and_unload(), and load the model that this gives."
_KEY = re.compile(r"(.+?)\.(lora_(?:embedding_)?[AB])(?:\.default)?(?:\.weight)?")
# Options that do not change the merged weights, or that this module follows.
_KNOWN = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"),
    *("revision", "inference_mode", "target_modules", "exclude_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "bias", "fan_in_fan_out"),
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config"),
    *("megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying"),
}
# The others begin by changing the base weights.
_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
# PEFT takes regular expressions; without groups none can run for ever.
_PATTERN = re.compile(r"[\w.\\|^$\[\]*+?-]{1,200}", re.ASCII)


@dataclass(frozen=True)
class Pair:
    """The two factors of one matrix, already with rows [out, in] in mind."""

    a: StoredTensor
    b: StoredTensor
    scale: float

    def delta(self) -> np.ndarray:
        """``scale * B A`` in float32 [out, in]."""
        (_, _, a), (_, _, b) = views([self.a, self.b])
        return (b.astype(np.float32) @ a.astype(np.float32)) * np.float32(self.scale)


Pairs = Mapping[tuple[str, int | None], Pair]


def read(
    path: Path, config: GPT2Config, tensors: list[StoredTensor]
) -> tuple[GPT2Config, list[StoredTensor], Pairs]:
    """Configuration and tensors with those that the adapter replaces, and its factors.

    Raises
    ------
    CheckpointError
        If the adapter is damaged, of another model, or no plain LoRA.
    """
    options = _options(path)
    entries = {_bare(entry.key): entry for entry in _entries(path)}
    factors: dict[str, dict[str, Entry]] = {}
    for key in list(entries):
        if (found := _KEY.fullmatch(key)) and "magnitude" not in key:
            factors.setdefault(found[1], {})[found[2]] = entries.pop(key)
    tied = config.tie_word_embeddings
    config, tensors = _replaced(config, tensors, entries, path)
    keys = {key: (name, layer) for key, name, layer, _ in huggingface_keys(config)}
    pairs = {}
    for module, parts in factors.items():
        if tied and module in ("wte", "lm_head"):
            # PEFT merges into both or, unmerged, into one: two different models.
            raise _refused(f"it adapts {module}, which is embedding and head at once", path)
        place = keys.get(f"{module}.weight")
        if place is None:
            raise _other_model(f"it adapts {module}, which the model has not", path)
        pairs[place] = _pair(module, parts, tensor_shape(config, place[0]), options, path)
    return config, tensors, pairs


def merged(
    tensors: Iterator[tuple[str, int | None, np.ndarray]], pairs: Pairs
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """The tensors, those that are adapted as new float32 arrays in C order."""
    for name, layer, array in tensors:
        pair = pairs.get((name, layer))
        if pair is not None:
            total = pair.delta()
            total += array
            array = total
        yield name, layer, array


def _options(path: Path) -> dict[str, Any]:
    place = path / ADAPTER_CONFIG
    try:
        options = json.loads(read_plain(place, _MAX_CONFIG))
        if not isinstance(options, dict):
            raise ValueError("it is not a JSON object")
    except OSError as error:
        raise unreadable(place, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not a valid adapter configuration: {error}",
            where=str(place),
            remedy="It is damaged; download it again.",
        ) from error
    kind, task = options.get("peft_type"), options.get("task_type")
    if kind != "LORA":
        raise _refused(f"it is of type {kind}, not LORA", path)
    if task not in (None, "CAUSAL_LM"):
        raise _refused(f"it is for the task {task}", path)
    start = options.get("init_lora_weights")
    if not isinstance(start, bool | str | None) or start not in _PLAIN_STARTS:
        raise _refused(f"init_lora_weights={start!r} changes the model's own weights", path)
    for name, value in options.items():
        if name not in _KNOWN and value:
            raise _refused(f"its option {name} is not supported", path)
    alphas = [options.get("lora_alpha", 8), *_patterns(options, "alpha_pattern", path).values()]
    ranks = [options.get("r", 8), *_patterns(options, "rank_pattern", path).values()]
    wrong = [rank for rank in ranks if not _is_number(rank, int) or rank < 1]
    wrong += [alpha for alpha in alphas if not _is_number(alpha, int | float)]
    if wrong:
        raise _refused(f"{wrong[0]!r} is no rank or alpha", path)
    return options


def _is_number(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _patterns(options: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    found = options.get(name) or {}
    if not isinstance(found, dict):
        raise _refused(f"its {name} is no object", path)
    for pattern in found:
        quantifiers = sum(map(pattern.count, "*+?"))
        try:
            re.compile(pattern)
        except re.error:
            quantifiers = 99
        if not _PATTERN.fullmatch(pattern) or quantifiers > 3:
            raise _refused(f"its {name} has the expression {pattern[:80]!r}", path)
    return found


def _entries(path: Path) -> list[Entry]:
    readers = (safetensors_file.read, folder.read_state_dict)
    for name, read_file in zip(ADAPTER_WEIGHTS, readers, strict=True):
        if exists(path / name):
            recognise.refuse_others(path / name)
            return read_file(path / name)
    raise CheckpointError(
        f"the adapter has no {' or '.join(ADAPTER_WEIGHTS)}",
        where=str(path),
        remedy="Download the folder again.",
    )


def _bare(key: str) -> str:
    """The key as the base model has it."""
    for prefix in ("base_model.model.", PREFIX):
        key = key.removeprefix(prefix)
    return key.replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


def _replaced(
    config: GPT2Config, tensors: list[StoredTensor], entries: dict[str, Entry], path: Path
) -> tuple[GPT2Config, list[StoredTensor]]:
    """With the tensors that the adapter holds whole: biases, and modules_to_save."""
    places = {(tensor.name, tensor.layer): tensor for tensor in tensors}
    whole = ("wte.weight", HEAD[0])
    if config.tie_word_embeddings and any(key in entries for key in whole):
        # One that was trained alone parts from the other, which stays as it was.
        config = dataclasses.replace(config, tie_word_embeddings=False)
        places["lm_head", None] = dataclasses.replace(places["wte", None], name="lm_head")
    for key, name, layer, conv1d in huggingface_keys(config):
        entry = entries.pop(key, None)
        if entry is None:
            continue
        shape = tensor_shape(config, name)[:: -1 if conv1d else 1]
        if entry.shape != shape:
            raise _other_model(
                f"{entry.key} has shape {list(entry.shape)}, the model asks for {list(shape)}", path
            )
        places[name, layer] = stored(entry, name, layer, in_out=conv1d)
    for key, entry in entries.items():
        if "lora_" in key:
            raise _refused(f"it has the tensor {entry.key}", path)
    leave_out(entries, path)
    return config, list(places.values())


def _pair(
    module: str,
    parts: dict[str, Entry],
    shape: tuple[int, ...],
    options: Mapping[str, Any],
    path: Path,
) -> Pair:
    name = _in_peft(module)
    rank = _chosen(options, "rank_pattern", name, options.get("r", 8))
    alpha = _chosen(options, "alpha_pattern", name, options.get("lora_alpha", 8))
    embedding = "lora_embedding_A" in parts
    first, second = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_A", "lora_B")
    if set(parts) != {first, second} or len(shape) != 2:
        raise _other_model(f"it has {', '.join(sorted(parts))} for {module}", path)
    a, b = parts[first], parts[second]
    # An embedding's two factors are those of its transpose.
    wanted = (shape[1], rank) if embedding else (rank, shape[1])
    other = (rank, shape[0]) if embedding else (shape[0], rank)
    for entry, expected in ((a, wanted), (b, other)):
        if entry.shape != expected:
            raise _other_model(
                f"{entry.key} has shape {list(entry.shape)}, the model and rank {rank} ask for "
                f"{list(expected)}",
                path,
            )
    scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    first_factor, second_factor = (stored(e, module, None, in_out=embedding) for e in (a, b))
    return Pair(first_factor, second_factor, scale)


def _in_peft(module: str) -> str:
    """The name of a module in the base model, which patterns are matched with."""
    return module if module.startswith("lm_head") else PREFIX + module


def _chosen(options: Mapping[str, Any], name: str, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name, as in PEFT."""
    for pattern, value in (options.get(name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _refused(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the adapter cannot be merged: {what}"[:300], where=str(path), remedy=_MERGED
    )


def _other_model(what: str, path: Path) -> CheckpointError:
    return CheckpointError(
        f"the adapter does not fit the model: {what}"[:300],
        where=str(path),
        remedy=f"Load the model that its {ADAPTER_CONFIG} names.",
    )
