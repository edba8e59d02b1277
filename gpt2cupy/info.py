"""What ``gpt2cupy info`` prints: versions, device, memory of a model, and what its kernels take."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import checkpoint, occupancy
from ._version import __version__
from .engine import Engine
from .errors import DeviceError, InputError
from .loading import load_model, resolve_device, resolve_dtype
from .ops import compiler, launch

# Threads of a block as ops launches the entries that have no __launch_bounds__, without the
# suffix of their type. Those of the ladders, which only tests and readers launch, are not here.
THREADS = {
    "embedding": 256,
    "layer_norm": 128,
    "add_layer_norm": 128,
    "gemv": 128,
    "gemv_scalar": 128,
    "bias_act": 256,
    "transpose": 256,
    "convert": 256,
}
_TYPE_SUFFIX = re.compile(r"_(f32|float32|float16|bfloat16)$")


def versions() -> dict[str, str]:
    """Installed versions of what the results may depend on."""
    found = {"gpt2cupy": __version__, "python": platform.python_version()}
    for name in ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "cuda-bindings"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def report(name: str, dtype: str, device: str, *, revision: str | None = None) -> dict[str, Any]:
    """What would run for one model on one device, in JSON's types; sizes in bytes."""
    model, source = load_model(name, dtype=dtype, device=device, revision=revision)
    config = model.config
    engine = Engine(model)
    facts: dict[str, Any] = {"versions": versions()}
    if model.xp is np:
        facts["device"] = {"kind": "cpu", "reason": _why_cpu(device)}
    else:
        index = model.weights.wte.device.id
        facts["device"] = {"kind": f"cuda:{index}", **_gpu(model.xp, index)}
        facts["gemv"] = model.gemv
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
        },
        "memory": {
            "weights": model.weights.nbytes,
            "cache": engine.cache.nbytes,
            "decode state": engine.state.nbytes,
            "prefill": engine.prefill_work.nbytes,
        },
    }


def _why_cpu(device: str) -> str:
    if device == "cpu":
        return "asked for"
    try:
        launch.cupy_module()
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
        yield "device", f"cpu ({device['reason']}): NumPy engine, weights held in float32"
    else:
        size = f"{device['sm_count']} SMs, {device['memory'] >> 20} MiB"
        yield "device", f"{device['kind']}, {device['name']}, {device['arch']}, {size}"
        yield "driver", f"CUDA {device['cuda_driver']}, runtime {device['cuda_runtime']}"
        yield "nvrtc", device["nvrtc"]
        yield "one-row product", f"{facts['gemv']} (forced by --gemv)"
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
    yield "dtype", f"{model['dtype']} (stored as {model['stored_dtype']})"
    for label, size in facts["memory"].items():
        yield label, f"{size / 2**20:.1f} MiB"


# -- kernels -------------------------------------------------------------------------------------


def kernel_report(
    name: str, dtype: str, device: str, arch: str | None, *, revision: str | None = None
) -> list[dict[str, Any]]:
    """What every kernel that a model may launch takes of an SM.

    Parameters
    ----------
    name, dtype, device : str
        As :func:`gpt2cupy.load` takes them; no weights are read.
    arch : str or None
        ``sm_90`` and the like: compiled for it and computed, without a GPU.
        None asks the driver about the kernels on ``device``.

    Returns
    -------
    list of dict
        source, entry, arch, registers and local_bytes per thread, shared_bytes
        per block, threads of a block, blocks_per_sm and occupancy (resident
        warps of those that an SM can hold); the last three are None for an entry
        that the package never launches.

    Raises
    ------
    DeviceError
        If ``arch`` is None and there is no GPU, or NVRTC is missing.
    """
    source = checkpoint.open(name, revision=revision)
    elem = resolve_dtype(dtype, source.dtype, "cuda")
    head_size = source.config.head_size
    if head_size > compiler.MAX_HEAD_SIZE:
        raise InputError(
            f"attention kernels take head sizes up to {compiler.MAX_HEAD_SIZE}, not {head_size}",
            where=name,
            remedy="This model runs on the CPU only.",
        )
    if arch is not None:
        if arch not in occupancy.LIMITS:
            raise InputError(
                f"unknown architecture {arch!r}",
                where="--arch",
                remedy=f"Use {', '.join(occupancy.LIMITS)}.",
            )
        return [
            _row(arch, file, entry, found, threads, _computed(arch, found, threads))
            for file, entry, found, threads in _entries(arch, elem, head_size)
        ]
    kind, index = resolve_device(device)
    if kind == "cpu":
        raise DeviceError(
            f"there is no GPU to ask about its kernels: {_why_cpu(device)}",
            remedy="Name an architecture: --arch sm_90.",
        )
    import cupy

    with cupy.cuda.Device(index):
        arch = launch.device_arch(index)
        rows = []
        for file, entry, found, threads in _entries(arch, elem, head_size):
            function = launch.load(file, elem, head_size).get_function(entry)
            rows.append(_row(arch, file, entry, *_asked(cupy, index, function, found, threads)))
        return rows


def _entries(
    arch: str, elem: np.dtype, head_size: int
) -> Iterator[tuple[str, str, occupancy.Resources, int | None]]:
    """(source, entry, what its cubin says, threads of a block), compiling what is not cached."""
    defines = {"ELEM": compiler.ELEMENT_TYPES[elem.name], "HS": str(head_size)}
    for file, macros in compiler.SOURCES.items():
        path = compiler.cubin(file, {macro: defines[macro] for macro in macros}, arch)
        for entry, found in sorted(occupancy.read_cubin(path).items()):
            threads = found.max_threads or THREADS.get(_TYPE_SUFFIX.sub("", entry))
            yield file, entry, found, threads


def _computed(
    arch: str, found: occupancy.Resources, threads: int | None
) -> tuple[int, float] | None:
    """Blocks of an SM and occupancy by the architecture's limits."""
    if threads is None:
        return None
    blocks = occupancy.blocks_per_sm(arch, threads, found.registers, found.shared_bytes)
    return blocks, blocks * -(-threads // occupancy.WARP) / occupancy.LIMITS[arch].warps


def _asked(
    cupy: Any, index: int, function: Any, found: occupancy.Resources, threads: int | None
) -> tuple[occupancy.Resources, int | None, tuple[int, float] | None]:
    """The same from the driver, for a loaded kernel."""
    attributes = function.attributes
    told = occupancy.Resources(
        attributes["num_regs"],
        attributes["local_size_bytes"],
        attributes["shared_size_bytes"],
        found.max_threads,
    )
    if threads is None:
        return told, None, None
    blocks = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
        function.kernel.ptr, threads, 0
    )
    most = cupy.cuda.Device(index).attributes["MaxThreadsPerMultiProcessor"]
    return told, threads, (blocks, blocks * threads / most)


def _row(
    arch: str,
    file: str,
    entry: str,
    found: occupancy.Resources,
    threads: int | None,
    resident: tuple[int, float] | None,
) -> dict[str, Any]:
    blocks, share = resident or (None, None)
    return {
        "source": file,
        "entry": entry,
        "arch": arch,
        "registers": found.registers,
        "local_bytes": found.local_bytes,
        "shared_bytes": found.shared_bytes,
        "threads": threads,
        "blocks_per_sm": blocks,
        "occupancy": share,
    }


def kernel_table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A kernel report in columns, for people."""
    names = [f"{row['source']}: {row['entry']}" for row in rows]
    width = max(map(len, names))
    head = ("registers", "spill B", "shared B", "threads", "blocks/SM", "occupancy")
    yield f"{rows[0]['arch']:<{width}}  " + "  ".join(head)
    keys = ("registers", "local_bytes", "shared_bytes", "threads", "blocks_per_sm", "occupancy")
    for name, row in zip(names, rows, strict=True):
        cells = []
        for label, key in zip(head, keys, strict=True):
            value = row[key]
            text = "-" if value is None else f"{value:.0%}" if key == "occupancy" else str(value)
            cells.append(f"{text:>{len(label)}}")
        yield f"{name:<{width}}  " + "  ".join(cells)
    yield "spill: local memory of a thread, which also holds arrays that are no registers."
