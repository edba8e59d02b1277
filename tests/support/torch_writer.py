"""Files as torch.save writes them, in both containers, written without PyTorch."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from gpt2cupy.checkpoint.layout import HEAD, LAYER, PREFIX, WHOLE

KINDS = {
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage",
    "uint8": "ByteStorage",
    "int64": "LongStorage",
}
BATCH = b"("


class Pickled:
    """A pickle of protocol 2 and the storages that it refers to."""

    def __init__(self, value: Any, *, legacy: bool = False) -> None:
        self.storages: dict[str, np.ndarray] = {}
        self.legacy = legacy
        self.data = b"\x80\x02" + self.dump(value) + b"."

    def dump(self, value: Any) -> bytes:
        if value is None:
            return b"N"
        if isinstance(value, bool):
            return b"\x88" if value else b"\x89"
        if isinstance(value, int):
            size = (value.bit_length() + 8) // 8
            body = value.to_bytes(size, "little", signed=True)
            return struct.pack("<ci", b"J", value) if size <= 4 else bytes([0x8A, size]) + body
        if isinstance(value, float):
            return struct.pack(">cd", b"G", value)
        if isinstance(value, str):
            return struct.pack("<cI", b"X", len(value.encode())) + value.encode()
        if isinstance(value, tuple):
            return b"(" + b"".join(map(self.dump, value)) + b"t"
        if isinstance(value, list):
            return b"](" + b"".join(map(self.dump, value)) + b"e"
        if isinstance(value, dict):
            items = b"".join(self.dump(k) + self.dump(v) for k, v in value.items())
            return b"}(" + items + b"u"
        return self.tensor(value)

    def tensor(self, array: np.ndarray) -> bytes:
        """An array as a view of the array that owns its memory."""
        owner = array if array.base is None else array.base
        known = [key for key, other in self.storages.items() if other is owner]
        key = known[0] if known else str(len(self.storages))
        self.storages[key] = owner
        kind = f"ctorch\n{KINDS[array.dtype.name]}\n".encode()
        view = b"N" if self.legacy else b""
        where = b"(" + self.dump("storage") + kind + self.dump(key) + self.dump("cpu")
        storage = where + self.dump(owner.size) + view + b"tQ"
        offset = array.__array_interface__["data"][0] - owner.__array_interface__["data"][0]
        steps = tuple(step // array.itemsize for step in array.strides)
        numbers = map(self.dump, (offset // array.itemsize, array.shape, steps, False))
        hooks = b"ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"".join(numbers) + hooks + b"tR"


def write_zip(path: Path, value: Any, *, pickled: bytes | None = None, method: int = 0) -> None:
    """The container of today; ``pickled`` replaces the pickle."""
    made = Pickled(value)
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("archive/data.pkl", made.data if pickled is None else pickled)
        file.writestr("archive/byteorder", "little")
        for key, array in made.storages.items():
            file.writestr(f"archive/data/{key}", array.tobytes())
        file.writestr("archive/version", "3\n")


def write_legacy(path: Path, value: Any, *, pickled: bytes | None = None) -> None:
    """The container before PyTorch 1.6."""
    made = Pickled(value, legacy=True)
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    parts = [Pickled(part).data for part in (0x1950A86A20F9469CFC6C, 1001, system)]
    parts += [made.data if pickled is None else pickled, Pickled(list(made.storages)).data]
    for array in made.storages.values():
        parts += [struct.pack("<q", array.size), array.tobytes()]
    path.write_bytes(b"".join(parts))


WRITERS = {"zip": write_zip, "legacy": write_legacy}


def write_bins(folder: Path, tensors: dict[str, np.ndarray], shards: int) -> None:
    """pytorch_model.bin in shards with their index."""
    places = {}
    for shard in range(shards):
        name = f"pytorch_model-{shard + 1:05}-of-{shards:05}.bin"
        part = {key: tensors[key] for key in list(tensors)[shard::shards]}
        write_zip(folder / name, part)
        places |= dict.fromkeys(part, name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def nanogpt_tensors(config: Any, weights: Any, *, bias: bool = True) -> dict[str, np.ndarray]:
    """Host weights under nanoGPT's names: matrices [out, in], head and embedding one array."""
    tensors = {PREFIX + key: np.array(getattr(weights, name)) for key, name in WHOLE.items()}
    tensors[PREFIX + "wte.weight"] = np.array(weights.wte[: config.vocab_size])
    for layer in range(config.n_layer):
        for key, (name, _) in LAYER.items():
            array = getattr(weights, name)[layer].astype(weights.dtype)
            tensors[f"{PREFIX}h.{layer}.{key}"] = np.array(array)
    if not bias:
        tensors = {key: array for key, array in tensors.items() if not key.endswith(".bias")}
    return tensors | {HEAD[0]: tensors[PREFIX + "wte.weight"]}


def nanogpt(config: Any, tensors: dict[str, np.ndarray], **changes: Any) -> dict[str, Any]:
    """What nanoGPT's train.py saves."""
    arguments = {
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "block_size": config.n_positions,
        "bias": True,
        "vocab_size": config.vocab_size,
        "dropout": 0.0,
    }
    state = {0: {"step": np.array(3.0, np.float32), "exp_avg": np.zeros(4, np.float32)}}
    groups = [{"lr": 6e-4, "betas": (0.9, 0.95), "foreach": None, "params": [0]}]
    return {
        "model": tensors,
        "optimizer": {"state": state, "param_groups": groups},
        "model_args": arguments | changes,
        "iter_num": 5000,
        "best_val_loss": np.array(3.2, np.float32),
        "config": {"out_dir": "out", "compile": True, "device": "cuda"},
    }
