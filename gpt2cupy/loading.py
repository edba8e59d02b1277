"""From a checkpoint to a GPT2 on a device: which device, which dtype, one copy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import checkpoint
from .config import GPT2Config
from .errors import InputError
from .model import GPT2
from .ops.launch import cupy_module, memory_error
from .ops.layout import Uploader
from .weights import Weights

DTYPES = ("float32", "float16", "bfloat16")
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def resolve_device(device: str) -> tuple[str, int]:
    """``("cpu", 0)`` or ``("cuda", index)``; "auto" takes the GPU where one can be used."""
    if device == "auto":
        try:
            cupy_module()
        except Exception:
            return "cpu", 0
        return "cuda", 0
    if device == "cpu":
        return "cpu", 0
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index == "" or index.isdigit()):
        raise InputError(
            f"unknown device {device!r}", where="device", remedy="Use auto, cpu, cuda or cuda:1."
        )
    count = cupy_module().cuda.runtime.getDeviceCount()
    if int(index or 0) >= count:
        raise InputError(
            f"there is no {device}", where="device", remedy=f"This machine has {count} GPU(s)."
        )
    return "cuda", int(index or 0)


def resolve_dtype(dtype: str, stored: np.dtype, kind: str) -> np.dtype:
    """The dtype that weights are held in: "auto" is the stored one on a GPU, float32 on the CPU."""
    name = stored.name if dtype == "auto" else _SHORT.get(dtype, dtype)
    if name not in DTYPES:
        raise InputError(
            f"unknown dtype {dtype!r}", where="dtype", remedy=f"Use auto, {', '.join(DTYPES)}."
        )
    if kind == "cpu":
        # NumPy computes in float32 anyway; narrower weights would be widened at every step.
        return np.dtype(np.float32)
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def load_model(
    name_or_path: str, *, dtype: str = "auto", device: str = "auto", revision: str | None = None
) -> tuple[GPT2, Any]:
    """The model and the checkpoint it came from."""
    source = checkpoint.open(name_or_path, revision=revision)
    kind, index = resolve_device(device)
    held = resolve_dtype(dtype, source.dtype, kind)
    return place(source.config, source.tensors(finite=kind == "cpu"), held, kind, index), source


def random_model(config: GPT2Config, seed: int, *, dtype: str, device: str) -> GPT2:
    kind, index = resolve_device(device)
    held = resolve_dtype(dtype, np.dtype(np.float32), kind)
    host = Weights.random(config, seed, held)
    if kind == "cpu":
        return GPT2(config, host)
    return place(config, weight_tensors(config, host), held, kind, index)


def weight_tensors(config: GPT2Config, weights: Weights) -> Iterator[tuple[str, int | None, Any]]:
    """(name, layer, array) of weights on the host, as :meth:`Weights.from_tensors` takes them."""
    for name, array in weights.items():
        if name in ("wte", "lm_head"):
            yield name, None, array[: config.vocab_size]
        elif name in ("wpe", "lnf_w", "lnf_b"):
            yield name, None, array
        else:
            yield from ((name, layer, array[layer]) for layer in range(config.n_layer))


def place(config: GPT2Config, tensors: Any, dtype: np.dtype, kind: str, index: int) -> GPT2:
    """Weights on their device, converted on arrival, and the model over them."""
    if kind == "cpu":
        return GPT2(config, Weights.from_tensors(config, tensors, dtype))
    cupy = cupy_module()
    with cupy.cuda.Device(index):
        try:
            weights = Weights.empty(config, dtype, cupy)
            uploader = Uploader()
            for name, layer, array in tensors:
                target = getattr(weights, name)
                if layer is not None:
                    target = target[layer]
                if name in ("wte", "lm_head"):
                    target = target[: config.vocab_size]
                uploader.place(array, target)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise memory_error(error, "the weights") from error
        cupy.cuda.get_current_stream().synchronize()
        return GPT2(config, weights)
