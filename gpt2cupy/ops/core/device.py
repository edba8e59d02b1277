"""CuPy and its GPUs: usable, or an error that names the remedy."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Iterator
from typing import Any

from ...errors import DeviceError, DeviceMemoryError, NoDeviceError

_PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "amd-cupy")
INSTALL = "Install gpt2cupy[cuda12] or gpt2cupy[cuda13], whichever fits the driver."
_OUT_OF_MEMORY, _OLD_DRIVER, _NO_DEVICE = 2, 35, 100  # cudaError_t, CUresult


@functools.cache
def cupy_packages() -> tuple[str, ...]:
    """The installed packages that bring a module ``cupy``; there may be only one."""
    found = []
    for name in _PACKAGES:
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        found.append(name)
    return tuple(found)


def import_cupy() -> Any:
    """CuPy's module; whether a GPU can be used is not looked at.

    Raises
    ------
    NoDeviceError
        If CuPy is not installed.
    DeviceError
        If it is installed twice, or cannot be imported.
    """
    packages = cupy_packages()
    if len(packages) > 1:
        raise DeviceError(
            f"{len(packages)} CuPy packages are installed, which overwrite each other's files",
            where=", ".join(packages),
            remedy=f"Uninstall all of them (pip uninstall {' '.join(packages)}). {INSTALL}",
        )
    try:
        import cupy
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "cupy":
            raise NoDeviceError(
                "CuPy is not installed", where="import cupy", remedy=INSTALL
            ) from error
        # CuPy wraps the first error in a page of advice.
        reason = str(error.__cause__ or error).strip().partition("\n")[0]
        raise DeviceError(
            f"CuPy cannot be imported: {reason}",
            where=", ".join(packages) or "import cupy",
            remedy=f"Uninstall it. {INSTALL}",
        ) from error
    return cupy


def cupy_module() -> Any:
    """CuPy with a usable GPU, or an error that says what is missing."""
    cupy = import_cupy()
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        # Without any driver CUDA says that it is too old.
        absent = error.status == _NO_DEVICE or (
            error.status == _OLD_DRIVER and not runtime.driverGetVersion()
        )
        raise (NoDeviceError if absent else DeviceError)(
            f"no GPU can be used: {error}",
            where="NVIDIA's driver",
            remedy="Install or update the driver, take the extra (cuda12, cuda13) that fits it, "
            "or use device='cpu'.",
        ) from error
    if not count:
        raise NoDeviceError(
            "there is no NVIDIA GPU",
            where="this machine, as CUDA_VISIBLE_DEVICES shows it",
            remedy="Use device='cpu'.",
        )
    return cupy


def current_device() -> int:
    # Asked for at every launch: an import statement would take longer than the answer.
    return sys.modules["cupy"].cuda.runtime.getDevice()


def sm_count() -> int:
    """Multiprocessors of the current device."""
    return _sm_count(current_device())


@functools.cache
def _sm_count(device: int) -> int:
    import cupy

    return cupy.cuda.Device(device).attributes["MultiProcessorCount"]


def shared_limit() -> int:
    """Bytes of shared memory that a block may have on the current device, if it asks for them."""
    return _shared_limit(current_device())


@functools.cache
def _shared_limit(device: int) -> int:
    import cupy

    attributes = cupy.cuda.Device(device).attributes
    return attributes["MaxSharedMemoryPerBlockOptin"]


def has_clusters() -> bool:
    """Whether the current device runs thread block clusters (sm_90 and newer)."""
    return int(device_arch(current_device())[3:]) >= 90


def has_programmatic_launch(device: int) -> bool:
    """Whether a kernel may start before the one that precedes it ends (sm_90 and newer)."""
    return int(device_arch(device)[3:]) >= 90


def has_mma() -> bool:
    """Whether the current device has mma.m16n8k16 for half and bfloat16 (sm_80 and newer)."""
    return int(device_arch(current_device())[3:]) >= 80


def has_wgmma() -> bool:
    """Whether the current device has products of a warpgroup, which sm_90 alone has."""
    return device_arch(current_device()) == "sm_90"


@functools.cache
def device_arch(device: int) -> str:
    """``sm_90`` and the like, checked to be one that the kernels support."""
    import cupy

    capability = cupy.cuda.Device(device).compute_capability
    if int(capability) < 75:
        name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
        raise DeviceError(
            f"this GPU has compute capability {capability[:-1]}.{capability[-1]}",
            where=f"cuda:{device}, {name}",
            remedy="The kernels need 7.5 (Turing) or newer; use device='cpu'.",
        )
    return f"sm_{capability}"


def memory_error(error: BaseException, what: str, whose: str = "the GPU") -> DeviceMemoryError:
    """The error for an allocation that was refused."""
    return DeviceMemoryError(
        f"{whose} has too little free memory for {what}: {error}",
        where="memory",
        remedy="Use a smaller model or dtype, run fewer sequences at once (max_batch), or close "
        f"other programs on {whose}.",
    )


@contextlib.contextmanager
def device_errors(what: str) -> Iterator[None]:
    """Errors of CuPy and the CUDA runtime, met while doing ``what``, as this package's."""
    import cupy

    try:
        yield
    except cupy.cuda.memory.OutOfMemoryError as error:
        raise memory_error(error, what) from error
    except (cupy.cuda.runtime.CUDARuntimeError, cupy.cuda.driver.CUDADriverError) as error:
        if error.status == _OUT_OF_MEMORY:
            raise memory_error(error, what) from error
        raise DeviceError(
            f"CUDA failed: {error}",
            where=what,
            remedy="The GPU is not usable in this process any more: start a new one, and report "
            "this if it comes again.",
        ) from error
