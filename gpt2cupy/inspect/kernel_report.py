"""What ``gpt2cupy info --kernels`` prints: what each kernel of a model takes of an SM."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .. import checkpoint
from ..config import GPT2Config
from ..errors import InputError, NoDeviceError, shown
from ..loading import resolve_device, resolve_dtype
from ..ops.core import compiler, launch
from ..ops.core import variants as ahead
from ..ops.core.device import device_arch
from . import occupancy
from .info import why_cpu


def report(
    name: str, dtype: str, device: str, arch: str | None, **source_options: str | None
) -> list[dict[str, Any]]:
    """What every kernel that a model may launch takes of an SM.

    Parameters
    ----------
    name, dtype, device : str
        As :func:`gpt2cupy.load` takes them; no weights are read.
    arch : str or None
        ``sm_90`` and the like: compiled for it and computed, without a GPU.
        None asks the driver about the kernels on ``device``.
    **source_options
        revision, variant and adapter, as :func:`gpt2cupy.load` takes them.

    Returns
    -------
    list of dict
        source, entry, macros, arch, registers and local_bytes per thread, shared_bytes
        per block, threads of a block, blocks_per_sm and occupancy (resident
        warps of those that an SM can hold); the last three are None for an entry
        that the package never launches.

    Raises
    ------
    NoDeviceError
        If ``arch`` is None and there is no GPU, or NVRTC is missing.
    """
    source = checkpoint.open(name, **source_options)
    elem = resolve_dtype(dtype, source.dtype, "cuda")
    variants = variants_of(source.config, name)
    if arch is not None:
        if arch not in occupancy.LIMITS:
            raise InputError(
                f"unknown architecture {shown(arch)}",
                where="--arch",
                remedy=f"Use {', '.join(occupancy.LIMITS)}.",
            )
        return [
            _row(arch, file, defines, entry, found, threads, _computed(arch, found, threads))
            for file, defines, entry, found, threads in _entries(arch, elem, variants)
        ]
    kind, index = resolve_device(device)
    if kind == "cpu":
        raise NoDeviceError(
            f"there is no GPU to ask about its kernels: {why_cpu(device)}",
            where=device,
            remedy="Name an architecture: --arch sm_90.",
        )
    import cupy

    with cupy.cuda.Device(index):
        arch = device_arch(index)
        rows = []
        for file, defines, entry, found, threads in _entries(arch, elem, variants):
            module = launch.load(file, defines)
            told, resident = _asked(cupy, index, module.get_function(entry), found, threads)
            rows.append(_row(arch, file, defines, entry, told, threads, resident))
        return rows


def variants_of(config: GPT2Config, name: str) -> list[tuple[str, dict[str, str]]]:
    """Every (source, macros) pair of a model's sizes, in any dtype."""
    if config.head_size > compiler.MAX_HEAD_SIZE:
        raise InputError(
            f"attention kernels take head sizes up to {compiler.MAX_HEAD_SIZE}, "
            f"not {config.head_size}",
            where=name,
            remedy="This model runs on the CPU only.",
        )
    inner_sizes = tuple(dict.fromkeys((config.n_embd, config.inner_size)))
    return [
        (source, defines)
        for source, defines in ahead.variants((config.head_size,), inner_sizes)
        if source != "decode_step.cu" or defines["K"] == str(config.n_embd)
    ]


def _entries(
    arch: str, elem: np.dtype, variants: list[tuple[str, dict[str, str]]]
) -> Iterator[tuple[str, dict[str, str], str, occupancy.Resources, int | None]]:
    """(source, macros, entry, what its cubin says, threads of a block), compiled if need be."""
    macro = compiler.ELEMENT_TYPES[elem.name]
    requested = [
        (file, defines, compiler.request(file, defines, arch))
        for file, defines in variants
        if defines.get("ELEM", macro) == macro and ahead.launched(file, defines, arch)
    ]
    for file, defines, cubin in requested:
        for entry, found in sorted(occupancy.read_cubin(cubin.result()).items()):
            # An entry without __launch_bounds__ is a step of a ladder, for tests and readers.
            yield file, defines, entry, found, found.max_threads


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
) -> tuple[occupancy.Resources, tuple[int, float] | None]:
    """What the driver says about a loaded kernel: resources, blocks of an SM and occupancy."""
    attributes = function.attributes
    told = occupancy.Resources(
        attributes["num_regs"],
        attributes["local_size_bytes"],
        attributes["shared_size_bytes"],
        found.max_threads,
    )
    if threads is None:
        return told, None
    blocks = cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
        function.kernel.ptr, threads, 0
    )
    most = cupy.cuda.Device(index).attributes["MaxThreadsPerMultiProcessor"]
    warps = blocks * -(-threads // occupancy.WARP)
    return told, (blocks, warps / (most // occupancy.WARP))


def _row(
    arch: str,
    file: str,
    defines: dict[str, str],
    entry: str,
    found: occupancy.Resources,
    threads: int | None,
    resident: tuple[int, float] | None,
) -> dict[str, Any]:
    blocks, share = resident or (None, None)
    return {
        "source": file,
        "entry": entry,
        "macros": defines,
        "arch": arch,
        "registers": found.registers,
        "local_bytes": found.local_bytes,
        "shared_bytes": found.shared_bytes,
        "threads": threads,
        "blocks_per_sm": blocks,
        "occupancy": share,
    }


def _kernel_name(row: dict[str, Any]) -> str:
    """Source, entry and the sizes it was compiled for."""
    sizes = [f" {key}={value}" for key, value in row["macros"].items() if key != "ELEM"]
    return f"{row['source']}: {row['entry']}{''.join(sizes)}"


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A report in columns, for people."""
    names = [_kernel_name(row) for row in rows]
    width = max(map(len, names))
    head = ("registers", "local B", "shared B", "threads", "blocks/SM", "occupancy")
    yield f"{rows[0]['arch']:<{width}}  " + "  ".join(head)
    keys = ("registers", "local_bytes", "shared_bytes", "threads", "blocks_per_sm", "occupancy")
    for name, row in zip(names, rows, strict=True):
        cells = []
        for label, key in zip(head, keys, strict=True):
            value = row[key]
            text = "-" if value is None else f"{value:.0%}" if key == "occupancy" else str(value)
            cells.append(f"{text:>{len(label)}}")
        yield f"{name:<{width}}  " + "  ".join(cells)
    yield "shared: what the source fixes; what some kernels ask for at launch is not in it"
    yield "local: memory of a thread for spilled registers and arrays that could not stay in them"
