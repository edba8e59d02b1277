"""The files of cuda_src as text: what each includes, its macros, constants and digests."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from ...digest import cuda_code, digest_cuda
from ...errors import CompileError
from .constexpr import Constants

_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


@functools.cache
def source_dir() -> Path:
    """The folder of the kernels: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).parent.parent.parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if (folder / "common.cuh").is_file():
            return folder
    raise CompileError(
        "the kernel sources are missing",
        where=str(package / "cuda_src"),
        remedy="Reinstall gpt2cupy; its wheel holds them.",
    )


@functools.cache
def source_closure(source: str) -> tuple[tuple[str, str], ...]:
    """The file and everything it includes with quotes, as (name, text), each once."""
    texts: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = (source_dir() / name).read_text(encoding="utf-8")
            waiting += _INCLUDE.findall(texts[name])
    return tuple(sorted(texts.items()))


def source_text(source: str) -> str:
    """The file itself, as it lies in cuda_src."""
    return dict(source_closure(source))[source]


def sources() -> tuple[str, ...]:
    """Every source that is compiled by itself."""
    return tuple(sorted(path.name for path in source_dir().glob("*.cu")))


@functools.cache
def macros(source: str) -> tuple[str, ...]:
    """The macros that a source is compiled with, as its text says.

    ELEM if it names the element type; HS, K and BATCH if it, or what it includes, gives them a
    value where there is none (``#ifndef K``).
    """
    code = {name: _code(text) for name, text in source_closure(source)}
    found = ["ELEM"] if re.search(r"\b(ELEM|elem_t)\b", code[source]) else []
    for macro in ("HS", "K", "BATCH"):
        if any(re.search(rf"^# ?ifndef {macro}$", text, re.MULTILINE) for text in code.values()):
            found.append(macro)
    return tuple(found)


@functools.cache
def source_digests(source: str) -> dict[str, str]:
    """The digest of each file of :func:`source_closure`, by name."""
    return {name: _digest(text) for name, text in source_closure(source)}


# Most headers belong to many sources.
_code, _digest = functools.cache(cuda_code), functools.cache(digest_cuda)


@functools.cache
def constants(source: str, **sizes: int) -> Constants:
    """The constants that a source and its includes declare, for some sizes (K, HS)."""
    return Constants((text for _, text in source_closure(source)), sizes)
