"""From a checkpoint to weights on a device: which device, which dtype, one copy."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np

from . import checkpoint
from .config import GPT2Config
from .errors import DeviceError, InputError, NoDeviceError, shown
from .ops import quantize as quantize_on_device
from .ops.core.device import cupy_module, device_arch, device_errors
from .ops.layout import Uploader
from .quantize import QuantizedMatrix, check_kind, through_int8
from .weights import Weights

DTYPES = ("float32", "float16", "bfloat16")
_QUANTIZED_ROWS = 8192  # of the vocabulary in float32 at a time
_SHORT = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def resolve_device(device: str) -> tuple[str, int]:
    """``("cpu", 0)`` or ``("cuda", index)``; "auto" takes the GPU where one can be used.

    A GPU that is there and cannot be used is an error, and under "auto" a
    warning; no GPU or no CuPy is neither.
    """
    if not isinstance(device, str):  # torch.device is spelled as ours are
        device = str(device) if hasattr(device, "type") else shown(device)
    if device == "auto":
        try:
            return "cuda", _usable(0)
        except NoDeviceError:
            return "cpu", 0
        except DeviceError as error:
            warnings.warn(f"running on the CPU: {error}", RuntimeWarning, stacklevel=4)
            return "cpu", 0
    if device == "cpu":
        return "cpu", 0
    match = re.fullmatch(r"cuda(?::(\d{1,4}))?", device, re.ASCII)
    if match is None:
        raise InputError(
            f"unknown device {shown(device)}",
            where="device",
            remedy="Use auto, cpu, cuda or cuda:1.",
        )
    return "cuda", _usable(int(match[1] or 0))


def _usable(index: int) -> int:
    """The index, if this machine has that GPU and the kernels run on it."""
    count = cupy_module().cuda.runtime.getDeviceCount()
    if index >= count:
        last = f" to cuda:{count - 1}" if count > 1 else ""
        raise InputError(
            f"there is no cuda:{index}", where="device", remedy=f"This machine has cuda:0{last}."
        )
    device_arch(index)
    return index


def resolve_dtype(dtype: str, stored: np.dtype, kind: str) -> np.dtype:
    """The dtype that weights are kept in: "auto" is the stored one on a GPU, float32 on the CPU.

    Another one that is asked for on the CPU is a warning: the same script may
    run on a GPU elsewhere.
    """
    name = _dtype_name(dtype)
    if kind == "cpu":
        # NumPy computes in float32 anyway; narrower weights would be widened at every step.
        if name not in ("auto", "float32"):
            warnings.warn(
                f"dtype={name!r} is for a GPU: the CPU holds weights and computes in float32",
                RuntimeWarning,
                stacklevel=4,
            )
        return np.dtype(np.float32)
    if name == "auto":
        return stored
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def _dtype_name(dtype: str) -> str:
    name = _SHORT.get(str(dtype), str(dtype))
    if name not in ("auto", *DTYPES):
        raise InputError(
            f"unknown dtype {shown(dtype)}", where="dtype", remedy=f"Use auto, {', '.join(DTYPES)}."
        )
    return name


def load_weights(
    name_or_path: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    adapter: str | None = None,
    quantize: str | None = None,
) -> tuple[Weights, checkpoint.Checkpoint]:
    """The weights and the checkpoint they came from, which has their config.

    Parameters are those of :func:`gpt2cupy.load`.
    """
    # A wrong argument is found before anything is downloaded.
    check_kind(quantize)
    kind, index = resolve_device(device)
    _dtype_name(dtype)
    source = checkpoint.open(name_or_path, revision=revision, variant=variant, adapter=adapter)
    held = resolve_dtype(dtype, source.dtype, kind)
    tensors = source.tensors(finite=True)
    return place(source.config, tensors, held, kind, index, quantize=quantize), source


def random_weights(
    config: GPT2Config, seed: int, *, dtype: str, device: str, quantize: str | None = None
) -> Weights:
    """Random weights in GPT-2's initialisation; the same for every device."""
    check_kind(quantize)
    kind, index = resolve_device(device)
    held = resolve_dtype(dtype, np.dtype(np.float32), kind)
    host = Weights.random(config, seed, held)
    if kind == "cpu" and quantize is None:
        return host
    return place(config, weight_tensors(config, host), held, kind, index, quantize=quantize)


def weight_tensors(config: GPT2Config, weights: Weights) -> Iterator[tuple[str, int | None, Any]]:
    """(name, layer, array) of weights on the host, as :meth:`Weights.from_tensors` takes them."""
    for name, array in weights.items():
        if name in ("wte", "lm_head"):
            yield name, None, array[: config.vocab_size]
        elif name in ("wpe", "lnf_w", "lnf_b"):
            yield name, None, array
        else:
            yield from ((name, layer, array[layer]) for layer in range(config.n_layer))


def place(
    config: GPT2Config,
    tensors: Any,
    dtype: np.dtype,
    kind: str,
    index: int,
    *,
    quantize: str | None = None,
) -> Weights:
    """Weights on their device, converted on arrival.

    Parameters
    ----------
    config : GPT2Config
    tensors : iterable of (name, layer or None, array)
        As :meth:`Weights.from_tensors` takes them.
    dtype : dtype
    kind, index
        As :func:`resolve_device` returns them.
    quantize : {None, "int8"}
    """
    if kind == "cpu":
        given = through_int8(tensors) if quantize else tensors
        return Weights.from_tensors(config, given, dtype)
    cupy = cupy_module()
    with cupy.cuda.Device(index), device_errors("the weights"):
        weights = Weights.empty(config, dtype, cupy, quantize=quantize)
        uploader = Uploader()
        for name, layer, array in tensors:
            target = getattr(weights, name)
            if layer is not None:
                target = target[layer]
            if isinstance(target, QuantizedMatrix):
                _place_quantized(uploader, array, target)
                continue
            if name in ("wte", "lm_head"):
                target = target[: config.vocab_size]
            uploader.place(array, target)
        cupy.cuda.get_current_stream().synchronize()
        return weights


def _place_quantized(uploader: Uploader, array: np.ndarray, target: QuantizedMatrix) -> None:
    """Quantise a matrix on the device, from the values as they are stored."""
    rows = _QUANTIZED_ROWS if array.flags.c_contiguous else len(array)
    stage = uploader.cupy.empty((min(rows, len(array)), array.shape[1]), np.float32)
    for first in range(0, len(array), rows):
        part = array[first : first + rows]
        uploader.place(part, stage[: len(part)])
        quantize_on_device(stage[: len(part)], out=target, first=first)
