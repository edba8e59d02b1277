"""What ``gpt2cupy info`` prints: versions, device, and the memory of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import decode, record
from ..decode import autotune
from ..errors import DeviceError
from ..generation.engine import Engine
from ..loading import load_weights
from ..model import GPT2
from ..ops.core import compiler, variants
from ..ops.core.device import cupy_module

_PACKAGES = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "cuda-bindings")


def report(
    name: str,
    dtype: str,
    device: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    adapter: str | None = None,
    quantize: str | None = None,
) -> dict[str, Any]:
    """What would run for one model on one device, in JSON's types; sizes in bytes."""
    weights, source = load_weights(
        name, dtype=dtype, device=device, revision=revision, variant=variant, adapter=adapter,
        quantize=quantize,
    )  # fmt: skip
    config = source.config
    model = GPT2(config, weights)
    engine = Engine(model)
    facts: dict[str, Any] = {"versions": record.versions(_PACKAGES)}
    if model.xp is np:
        facts["device"] = {"kind": "cpu", "reason": why_cpu(device)}
    else:
        index = model.weights.wte.device.id
        facts["device"] = {"kind": f"cuda:{index}", **_gpu(model.xp, index)}
        facts["gemv"] = model.gemv
    facts["decode"] = engine.decoder.name
    with engine.device, engine.stream:
        facts["decode_times"] = decode_times(model)
    facts["decode_context"] = autotune.context_of(model)
    return facts | {
        "kernel_cache": str(compiler.cache_dir()),
        "model": {
            "name": source.name,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "head_size": config.head_size,
            "n_embd": config.n_embd,
            "n_positions": config.n_positions,
            "vocab_size": config.vocab_size,
            "dtype": model.dtype.name,
            "stored_dtype": source.dtype.name,
            "quantize": quantize,
        },
        "memory": {
            "weights": model.weights.nbytes,
            "norm shifts": model.shifts.nbytes,
            "cache": engine.cache.nbytes,
            "decode state": engine.state.nbytes,
            "prefill": engine.prompts.nbytes,
        },
    }


def decode_times(model: GPT2) -> dict[str, dict[str, float]]:
    """Microseconds of a step by rows and decode path where there is a choice, what is taken first.

    On the current device and stream; measured where they are not remembered.
    """
    choices = [rows for rows in variants.STEP_ROWS if "persistent" in decode.usable(model, rows)]
    return {str(rows): decode.times(model, rows) for rows in choices}


def why_cpu(device: str) -> str:
    """Why ``device`` takes the CPU here."""
    if device == "cpu":
        return "asked for"
    try:
        cupy_module()
    except DeviceError as error:
        return error.what
    except Exception as error:
        # CuPy itself may fail to load in many ways; device="auto" takes the CPU in all of them.
        return str(error).partition("\n")[0]
    return "no GPU can be used"


def _gpu(cupy: Any, index: int) -> dict[str, Any]:
    runtime = cupy.cuda.runtime
    properties = runtime.getDeviceProperties(index)
    return {
        "name": properties["name"].decode(),
        "arch": f"sm_{properties['major']}{properties['minor']}",
        "sm_count": properties["multiProcessorCount"],
        "memory": properties["totalGlobalMem"],
        "cuda_driver": runtime.driverGetVersion(),
        "cuda_runtime": runtime.runtimeGetVersion(),
        "nvrtc": ".".join(map(str, compiler.nvrtc_version())),
    }


def lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(label, text) lines of a report, for people."""
    yield "versions", ", ".join(f"{key} {value}" for key, value in facts["versions"].items())
    device = facts["device"]
    if device["kind"] == "cpu":
        yield "device", f"cpu ({device['reason']}): NumPy engine, weights in float32"
    else:
        size = f"{device['sm_count']} SMs, {device['memory'] >> 20} MiB"
        yield "device", f"{device['kind']}, {device['name']}, {device['arch']}, {size}"
        yield "driver", f"CUDA {device['cuda_driver']}, runtime {device['cuda_runtime']}"
        yield "nvrtc", device["nvrtc"]
        yield "few rows by", f"{facts['gemv']} (change with generate --gemv)"
    yield "decode path", f"{facts['decode']} (change with generate --decode)"
    for rows, times in facts["decode_times"].items():
        shown = ", ".join(f"{name} {us:.0f} us" for name, us in times.items())
        yield (
            f"step of {rows}",
            f"{shown} (the first is taken; measured once, context {facts['decode_context']})",
        )
    yield "kernel cache", facts["kernel_cache"]
    model = facts["model"]
    yield (
        "model",
        (
            f"{model['name']}: {model['n_layer']} layers, {model['n_head']} heads x "
            f"{model['head_size']}, width {model['n_embd']}, context {model['n_positions']}, "
            f"vocabulary {model['vocab_size']}"
        ),
    )
    held = f"{model['dtype']} (stored as {model['stored_dtype']})"
    if model["quantize"]:
        on_cpu = ", on the CPU dequantised" if device["kind"] == "cpu" else ""
        held += f", matrices in {model['quantize']}{on_cpu}"
    yield "dtype", held
    for label, size in facts["memory"].items():
        yield label, f"{size / 2**20:.1f} MiB"
