"""Records: what was measured, on what, by which command, and from which sources.

A record is JSON in bench/results. It holds a digest of the meaning of each file that the
measured processes loaded, so that a document can tell whether its figures still belong to the
code: a comment, a docstring or a file that was not used makes no record stale.
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
import time
from pathlib import Path
from typing import Any

from ._version import __version__
from .digest import digest_cuda, digest_python
from .output import file_errors

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"

# The modules that speed and numbers depend on, with those below them; not the command line.
MEASURED = (
    "cache", "decode", "engine", "generation", "model", "ops", "quantize", "request", "sampling",
    "server", "shifts", "torch", "weights", "workspace",
)  # fmt: skip
# A door that fetches by name: what is fetched stands in a file of its own.
_DOORS = ("gpt2cupy.ops",)

_PACKAGES = ("numpy", "cupy-cuda12x", "cupy-cuda13x", "nvmath-python", "torch", "transformers")


_BEGAN = time.monotonic()
# What other processes of this measurement loaded, as loaded() says it.
_elsewhere: list[dict[str, dict[str, str]]] = []


def loaded() -> dict[str, dict[str, str]]:
    """What this process loaded so far, and what others told :func:`add_loaded`.

    Returns
    -------
    dict
        ``files``: path in the repository -> digest of its meaning (digest.py), of the modules
        of :data:`MEASURED` and of the kernels with all they include. ``cubins``: source,
        architecture and macros of a kernel -> SHA-256 of its machine code.
    """
    files, cubins = {}, {}
    for name, module in sorted(sys.modules.items()):
        package, _, inner = name.partition(".")
        if package == "gpt2cupy" and inner.split(".")[0] in MEASURED and name not in _DOORS:
            path = Path(module.__file__ or "")
            files[path.relative_to(ROOT).as_posix()] = digest_file(path)
    # Only a process that imported it can have launched a kernel.
    if launch := sys.modules.get("gpt2cupy.ops.core.launch"):
        for (source, *about), path in launch.loaded.items():
            digests = launch.cuda_source.source_digests(source)
            files |= {f"cuda_src/{name}": digest for name, digest in digests.items()}
            cubins[" ".join([source, *about])] = hashlib.sha256(path.read_bytes()).hexdigest()
    for each in _elsewhere:
        files |= each["files"]
        cubins |= each["cubins"]
    return {"files": dict(sorted(files.items())), "cubins": dict(sorted(cubins.items()))}


def add_loaded(found: dict[str, dict[str, str]]) -> None:
    """Add what another process of this measurement loaded, as its :func:`loaded` said it."""
    _elsewhere.append(found)


def digest_file(path: Path) -> str:
    """The digest of a source by its meaning, CUDA or Python by the file's name."""
    digest = digest_cuda if path.suffix in (".cu", ".cuh") else digest_python
    return digest(path.read_text(encoding="utf-8"))


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
        Whether it was measured on a GPU, which is then described.
    complete : bool
        Whether all that was asked for was measured, or skipped with a reason.

    Raises
    ------
    Gpt2CupyError
        If the file cannot be written.
    """
    record = {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", *map(_portable, sys.argv)]),
        "seconds": round(time.monotonic() - _BEGAN),
        "environment": environment(gpu=gpu),
        **loaded(),
        "complete": complete,
        "results": results,
    }
    with file_errors(Path(path), "the record"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(record, indent=1) + "\n")
    return record


def is_current(record: dict[str, Any]) -> bool:
    """Whether what the record was measured with is what the sources say today."""
    return not changes(record)


def changes(record: dict[str, Any]) -> list[str]:
    """Why a record is stale: the files whose meaning is another now; none if it is current."""
    if "files" not in record:
        return ["it does not say which files it depends on: measure it again"]
    found = []
    for name, digest in record["files"].items():
        path = ROOT / name
        if not path.is_file():
            found.append(f"{name} (gone)")
        elif digest_file(path) != digest:
            found.append(name)
    return found


def is_complete(record: dict[str, Any]) -> bool:
    """Whether the command came to its end."""
    return record.get("complete", True)
