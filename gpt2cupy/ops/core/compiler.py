"""From a file in cuda_src to a cubin on disk: NVRTC, and a cache that a second process only reads.

NVRTC releases the interpreter, so kernels are compiled side by side, a thread on each core.
Works without a GPU: ``gpt2cupy compile --arch sm_90`` fills the cache ahead of time.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ...errors import CompileError
from .cuda_source import source_closure, source_digests
from .device import import_cupy
from .jobs import Jobs, threads
from .processes import Compilers

ELEMENT_TYPES = {"float32": "float", "float16": "__half", "bfloat16": "__nv_bfloat16"}
ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
MAX_HEAD_SIZE = 128
# The first NVRTC to know them, for chips newer than the oldest NVRTC that CuPy loads.
NEWER_CHIPS = {
    "sm_100": "12.8", "sm_120": "12.8", "sm_103": "12.9", "sm_121": "12.9", "sm_88": "13.0",
    "sm_110": "13.0",
}  # fmt: skip

# By what name NVRTC compiles for a chip with instructions that only that one has: of sm_90 the
# products of a warpgroup (wgmma).
OWN_FEATURES = {"sm_90": "sm_90a"}

_jobs = Jobs("gpt2cupy-nvrtc")
watched = _jobs.watched  # with watched(callback): tells it how many are compiled, and of how many
_compilers: Compilers | None = None  # inside of in_processes()

_unwritable = threading.Lock()  # of the thread that makes the folder of this process, and says so
os.register_at_fork(
    before=_unwritable.acquire,
    after_in_parent=_unwritable.release,
    after_in_child=_unwritable.release,
)


def cache_dir() -> Path:
    """Where cubins are kept: GPT2CUPY_CACHE_DIR, else the user's cache folder."""
    explicit = os.environ.get("GPT2CUPY_CACHE_DIR")
    if explicit:
        return Path(explicit)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "gpt2cupy"
    except RuntimeError as error:
        raise CompileError(
            "there is no home folder to keep compiled kernels in",
            where="kernel cache",
            remedy="Set GPT2CUPY_CACHE_DIR to a folder that can be written.",
        ) from error


@functools.cache
def _process_dir() -> tempfile.TemporaryDirectory:
    """A folder for this process alone, for when the cache cannot be written."""
    return tempfile.TemporaryDirectory(prefix="gpt2cupy-")


def nvrtc() -> Any:
    """CuPy's binding of NVRTC, checked to be loadable."""
    import_cupy()
    try:
        from cupy.cuda import nvrtc as binding

        binding.getVersion()
    except Exception as error:
        raise CompileError(
            f"NVRTC, the CUDA run-time compiler, cannot be loaded: {error}",
            where="libnvrtc",
            remedy="Install the NVRTC wheel of your CUDA version: nvidia-cuda-nvrtc-cu12, or "
            "nvidia-cuda-nvrtc for CUDA 13 (the extras cuda12 and cuda13 bring them).",
        ) from error
    return binding


def nvrtc_version() -> tuple[int, int]:
    return nvrtc().getVersion()


def cubin(source: str, defines: Mapping[str, str], arch: str) -> Path:
    """Path of the compiled source: :func:`request`, waited for."""
    return request(source, defines, arch).result()


def request(source: str, defines: Mapping[str, str], arch: str) -> Future[Path]:
    """The path of the compiled source, which is compiled meanwhile if there is none yet.

    A key is compiled at most once by a process, and by none that finds it in the cache.

    Parameters
    ----------
    source : str
        File name in cuda_src.
    defines : mapping
        Macros, e.g. ``{"ELEM": "__half", "HS": "64"}``.
    arch : str
        ``sm_90`` and the like.

    Returns
    -------
    Future of Path
        Its ``result()`` waits, and raises CompileError if NVRTC does not know the
        architecture or refuses the source.

    Raises
    ------
    CompileError
        If NVRTC is missing.
    """
    target = OWN_FEATURES.get(arch, arch)
    options = [f"-arch={target}", "-std=c++17", *(f"-D{k}={v}" for k, v in sorted(defines.items()))]
    key = hashlib.sha256(
        repr((source_digests(source), options, nvrtc_version())).encode()
    ).hexdigest()
    name = f"{Path(source).stem}-{arch}-{key[:24]}.cubin"
    if (path := _find(name)) is None:
        return _jobs.start(name, lambda: _find(name) or _compile(name, source, options))
    found: Future[Path] = Future()
    found.set_result(path)
    return found


@contextlib.contextmanager
def in_processes() -> Iterator[None]:
    """Compile in a process for each core, up to 32, meanwhile, instead of in threads of this one.

    Worth their start where there are many more sources than a model needs at first.
    """
    global _compilers
    _compilers = compilers = Compilers(threads(), compile_source)
    try:
        yield
    finally:
        _compilers = None
        compilers.close()


def _find(name: str) -> Path | None:
    """Where a cubin is kept, if it is."""
    folders = [cache_dir()]
    if _process_dir.cache_info().currsize:
        folders.append(Path(_process_dir().name))
    for folder in folders:
        with contextlib.suppress(OSError):  # out of reach: writing there says so
            if (folder / name).is_file():
                return folder / name
    return None


def _compile(name: str, source: str, options: list[str]) -> Path:
    compilers = _compilers
    compiled = compile_source if compilers is None else compilers.compile_source
    folder, binary = cache_dir(), compiled(source, options)
    try:
        return write_atomically(folder / name, binary)
    except OSError as error:
        refused = error
    with _unwritable:
        if not _process_dir.cache_info().currsize:
            warnings.warn(
                f"kernels cannot be kept in {folder} ({refused.strerror}); every process will "
                "compile them again. Set GPT2CUPY_CACHE_DIR to a folder that can be written.",
                RuntimeWarning,
                stacklevel=1,
            )
        try:
            return write_atomically(Path(_process_dir().name) / name, binary)
        except OSError as error:
            raise CompileError(
                f"there is no place to keep compiled kernels: {error.strerror}",
                where=str(folder),
                remedy="Set GPT2CUPY_CACHE_DIR or TMPDIR to a folder that can be written.",
            ) from error


def write_atomically(path: Path, data: bytes) -> Path:
    """Write a file that others may read meanwhile; makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path


def compile_source(source: str, options: list[str]) -> bytes:
    """Compile one source to a cubin with NVRTC; our includes come from memory."""
    binding = nvrtc()
    texts = dict(source_closure(source))
    code = texts.pop(source)
    program = binding.createProgram(code, source, _encoded(texts.values()), _encoded(texts))
    try:
        binding.compileProgram(program, (*options, *_cuda_includes()))
        return binding.getCUBIN(program)
    except binding.NVRTCError as error:
        log = binding.getProgramLog(program)
        if "INVALID_OPTION" in str(error):
            version = ".".join(map(str, binding.getVersion()))
            raise CompileError(
                f"NVRTC {version} cannot compile with {' '.join(options)}",
                where=source,
                remedy=_newer_nvrtc(binding, options),
            ) from error
        raise CompileError(
            f"NVRTC refused the source:\n{log}",
            where=f"{source}, {' '.join(options)}",
            remedy="If a CUDA header is missing, install the CUDA runtime wheel "
            "(extra cuda12 or cuda13); otherwise report this with the log.",
        ) from error
    finally:
        binding.destroyProgram(program)


def _newer_nvrtc(binding: Any, options: list[str]) -> str:
    """What to do about an NVRTC that refuses the options."""
    known = [f"sm_{number}" for number in binding.getSupportedArchs()]
    arch = next((o.removeprefix("-arch=") for o in options if o.startswith("-arch=")), "")
    arch = {own: chip for chip, own in OWN_FEATURES.items()}.get(arch, arch)
    # Code for a chip of which only the PTX is kept is asked for by another name.
    if arch.replace("compute_", "sm_") in known:
        return "It knows this chip, so another option is wrong: report this with the message."
    extras = "gpt2cupy[cuda13], or gpt2cupy[cuda12] where the driver is of CUDA 12"
    if since := NEWER_CHIPS.get(arch):
        wheel = "gpt2cupy[cuda13]" if since >= "13" else extras
        need = f"{arch} needs NVRTC {since} or newer: install {wheel}, with pip's --upgrade."
    else:
        need = f"If {arch} is a newer chip, install {extras}, with pip's --upgrade."
    return f"{need} The one that was found knows {', '.join(known)}."


def _encoded(texts: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(text.encode() for text in texts)


@functools.cache
def _cuda_includes() -> tuple[str, ...]:
    """Options naming the folders of cuda_fp16.h and what it includes."""
    try:
        from cuda.pathfinder import find_nvidia_header_directory

        found = [find_nvidia_header_directory(name) for name in ("cudart", "nvcc")]
    except ImportError:  # it comes with CuPy
        found = []
    folders = dict.fromkeys(folder for folder in found if folder)
    if not any((Path(folder) / "cuda_fp16.h").is_file() for folder in folders):
        raise CompileError(
            "the CUDA headers are missing",
            where="cuda_fp16.h",
            remedy="Install the CUDA runtime wheel: nvidia-cuda-runtime-cu12, or "
            "nvidia-cuda-runtime for CUDA 13 (the extras cuda12 and cuda13 bring them).",
        )
    return tuple(f"-I{folder}" for folder in folders)
