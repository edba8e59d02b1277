"""Records: what was measured, on what, by which command, and from which sources.

A record is JSON in bench/results. It holds the hash of the files it depends on,
so that a document can tell whether its figures still belong to the code.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from ._version import __version__
from .output import file_errors

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

# What speed and numbers on the GPU depend on; not the command line, not documents.
GPU_SOURCES = (
    "cuda_src/*.cu",
    "cuda_src/*.cuh",
    "gpt2cupy/ops/**/*.py",
    "gpt2cupy/decode/*.py",
    "gpt2cupy/weights.py",
    "gpt2cupy/quantize.py",
    "gpt2cupy/cache.py",
    "gpt2cupy/model.py",
    "gpt2cupy/shifts.py",
    "gpt2cupy/workspace.py",
    "gpt2cupy/generation/engine.py",
)
CPU_SOURCES = (
    "gpt2cupy/ops/reference*.py",
    "gpt2cupy/decode/*.py",
    "gpt2cupy/weights.py",
    "gpt2cupy/quantize.py",
    "gpt2cupy/cache.py",
    "gpt2cupy/model.py",
    "gpt2cupy/workspace.py",
    "gpt2cupy/generation/engine.py",
)

_PACKAGES = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "torch", "transformers")


def source_hash(patterns: tuple[str, ...] | list[str]) -> str:
    """SHA-256 over the names and contents of the files that the patterns match."""
    digest = hashlib.sha256()
    for path in sorted({p for pattern in patterns for p in ROOT.glob(pattern)}):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of gpt2cupy, Python and those packages that are installed."""
    found = {"gpt2cupy": __version__, "python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def environment(*, gpu: bool) -> dict[str, Any]:
    """Device, driver and library versions."""
    found: dict[str, Any] = dict(versions(_PACKAGES))
    found["cpu"] = _cpu_name()
    if gpu:
        import cupy

        from .ops.core import compiler

        runtime = cupy.cuda.runtime
        properties = runtime.getDeviceProperties(runtime.getDevice())
        found["gpu"] = properties["name"].decode()
        found["sm_count"] = properties["multiProcessorCount"]
        found["cuda_driver"] = runtime.driverGetVersion()
        found["nvrtc"] = ".".join(map(str, compiler.nvrtc_version()))
        found |= _nvidia_smi()
    return found


# What nvidia-smi is asked for -> the name in a record. Clocks are those right after measuring;
# a kernel that takes much power may have run at less.
_QUERIES = {
    "driver_version": "driver",
    "clocks.sm": "sm_clock_mhz",
    "clocks.max.sm": "max_sm_clock_mhz",
    "clocks.mem": "memory_clock_mhz",
}


def _nvidia_smi() -> dict[str, Any]:
    """Driver and clocks of the first GPU; without nvidia-smi the driver is "unknown"."""
    query = ["nvidia-smi", f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return {"driver": "unknown"}
    values = [value.strip() for value in answer.stdout.partition("\n")[0].split(",")]
    found: dict[str, Any] = dict(zip(_QUERIES.values(), values, strict=False))
    # A driver that does not tell a clock writes [N/A].
    clocks = {key: int(text) for key, text in found.items() if text.isdigit()}
    return {"driver": found.get("driver") or "unknown"} | clocks


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def _portable(argument: str) -> str:
    """An argument of the command without the folders of this machine."""
    option, equals, value = argument.rpartition("=")
    path = Path(value)
    if not path.is_absolute():
        return argument
    inside = path.is_relative_to(ROOT)
    return option + equals + (path.relative_to(ROOT).as_posix() if inside else path.name)


def write(path: str | Path, results: Any, *, gpu: bool, complete: bool = True) -> dict[str, Any]:
    """Write a record; returns it.

    Parameters
    ----------
    path : path
        Where to; by convention a file in bench/results.
    results : JSON value
        What was measured, with units in the names.
    gpu : bool
        Whether it was measured on a GPU, and so depends on the kernels.
    complete : bool
        Whether all that was asked for was measured, or skipped with a reason.

    Raises
    ------
    Gpt2CupyError
        If the file cannot be written.
    """
    sources = list(GPU_SOURCES if gpu else CPU_SOURCES)
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *map(_portable, sys.argv)]),
        "environment": environment(gpu=gpu),
        "sources": sources,
        "source_hash": source_hash(sources),
        "complete": complete,
        "results": results,
    }
    with file_errors(Path(path), "the record"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    return record


def is_current(record: dict[str, Any]) -> bool:
    """Whether the sources are still those that the record was measured with."""
    return record["source_hash"] == source_hash(record["sources"])


def is_complete(record: dict[str, Any]) -> bool:
    """Whether the command came to its end."""
    return record.get("complete", True)
