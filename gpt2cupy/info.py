"""What ``gpt2cupy info`` prints: versions, device, and the memory budget of a model."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterator

import numpy as np

from ._version import __version__
from .engine import Engine
from .loading import load_model
from .ops import compiler


def versions() -> dict[str, str]:
    """Installed versions of what the results may depend on."""
    found = {"gpt2cupy": __version__, "python": platform.python_version()}
    for name in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "cuda-bindings"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report(name: str, dtype: str, device: str) -> Iterator[tuple[str, str]]:
    """(label, text) lines for one model on one device."""
    yield "versions", ", ".join(f"{key} {value}" for key, value in versions().items())
    model, source = load_model(name, dtype=dtype, device=device)
    if model.xp is np:
        yield "device", "cpu: NumPy engine, weights held in float32"
    else:
        runtime = model.xp.cuda.runtime
        properties = runtime.getDeviceProperties(model.weights.wte.device.id)
        yield (
            "device",
            (
                f"{properties['name'].decode()}, sm_{properties['major']}{properties['minor']}, "
                f"{properties['multiProcessorCount']} SMs, {properties['totalGlobalMem'] >> 20} MiB"
            ),
        )
        yield "driver", f"CUDA {runtime.driverGetVersion()}, runtime {runtime.runtimeGetVersion()}"
        yield "nvrtc", ".".join(map(str, compiler.nvrtc_version()))
        yield "one-row product", f"{model.gemv} (forced by gemv=)"
    yield "kernel cache", str(compiler.cache_dir())
    config = model.config
    yield (
        "model",
        (
            f"{source.name}: {config.n_layer} layers, {config.n_head} heads x {config.head_size}, "
            f"width {config.n_embd}, context {config.n_positions}, vocabulary {config.vocab_size}"
        ),
    )
    yield "dtype", f"{model.dtype} (stored as {source.dtype})"
    engine = Engine(model)
    budget = {
        "weights": model.weights.nbytes,
        "cache": engine.cache.nbytes,
        "decode state": engine.state.nbytes,
        "prefill": engine.prefill_work.nbytes,
    }
    for label, size in budget.items():
        yield label, f"{size / 2**20:.1f} MiB"
