"""The ``extern "C"`` entries of a source and their parameters, read from its text.

The driver takes the values of a launch by their places alone: where one is missing it reads memory
that is not there. So what a Kernel declares is compared with the source before its first launch.
"""

from __future__ import annotations

import functools
import re
from typing import NamedTuple

from ...errors import InputError
from .cuda_source import source_text
from .signature import Parameter

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_DEFINE = re.compile(r"# *define (\w+)\(([^)]*)\)(.*)")
_ENTRY = re.compile(
    r'extern "C" __global__ void\s+'
    r"(?:(?:__cluster_dims__|__launch_bounds__)\((?:[^()]|\([^()]*\))*\)\s*)*"
    r"(\w+)\(([^)]*)\)"
)
_VALUE = re.compile(r"(.*?)\b(\w+)$", re.DOTALL)
# By dtype what an array's elements are in CUDA; of bytes (uint8) kernels make structs.
_ELEMENTS = {
    "ELEM": ("elem_t", "ELEM"),
    "float32": ("float",),
    "float16": ("__half", "half"),
    "bfloat16": ("__nv_bfloat16", "scale_t"),
    "int8": ("signed char", "int8_t"),
    "int32": ("int", "int32_t"),
    "int64": ("long long", "int64_t"),
    "uint32": ("u32", "unsigned", "unsigned int", "uint32_t"),
}
_SCALARS = {
    "int32": ("int", "int32_t"),
    "int64": ("long long", "int64_t"),
    "float32": ("float",),
    "tiles": ("TensorMap",),
}


class Value(NamedTuple):
    """A parameter of an entry: ``float`` and whether it is a pointer, and its name."""

    type: str
    pointer: bool
    name: str

    def __str__(self) -> str:
        return f"{self.type}{'*' if self.pointer else ''} {self.name}"


@functools.cache
def entries(source: str) -> dict[str, tuple[Value, ...]]:
    """The parameters of each entry of a source, with the macros that make entries expanded."""
    text = re.sub(r"\\\n", " ", _COMMENT.sub("", source_text(source)))
    macros: dict[str, tuple[list[str], str]] = {}
    plain = []
    for line in text.splitlines():
        if define := _DEFINE.match(line):
            macros[define[1]] = [name.strip() for name in define[2].split(",")], define[3]
        else:
            plain.append(line)
    code = "\n".join(plain)
    for macro, (names, body) in macros.items():
        for use in re.finditer(rf"^{macro}\((.*)\)\s*$", code, re.MULTILINE):
            expanded = body
            for name, given in zip(names, use[1].split(","), strict=True):
                expanded = re.sub(rf"(?:##)?\b{name}\b", given.strip(), expanded)
            code += "\n" + expanded
    return {
        entry: tuple(_value(text) for text in listed.split(",") if text.strip())
        for entry, listed in _ENTRY.findall(code)
    }


def _value(text: str) -> Value:
    kind, name = _VALUE.match(text.strip()).groups()  # type: ignore[union-attr]
    words = re.sub(r"\bconst\b|\b__(?:restrict|grid_constant)__\b|\*", " ", kind).split()
    return Value(" ".join(words), "*" in kind, name)


def check_entry(source: str, entry: str, parameters: tuple[Parameter, ...]) -> None:
    """Compare the parameters that a Kernel declares with those of its entry.

    There must be as many, arrays must stand where pointers do, of the same element type, and
    scalars where scalars do. A name that both have must have the same place in both.

    Raises
    ------
    InputError
        If they differ, or if the source has no such entry.
    """
    found = entries(source)
    where = f"{source}: {entry}"
    if entry not in found:
        raise InputError(
            f"{source} has no entry {entry}",
            where=where,
            remedy=f"It has {', '.join(found) or 'none'}, each of which begins "
            'extern "C" __global__ void.',
        )
    theirs = found[entry]
    if len(parameters) == len(theirs):
        places = {value.name: place for place, value in enumerate(theirs)}
        wrong = [
            f"{parameter.name} is {value}"
            for place, (parameter, value) in enumerate(zip(parameters, theirs, strict=True))
            if not _fits(parameter, value) or places.get(parameter.name, place) != place
        ]
        if not wrong:
            return
        differ = f"the parameters of the Kernel are not those of the source, where {wrong[0]}"
    else:
        differ = f"the Kernel declares {len(parameters)} parameters, the source {len(theirs)}"
    raise InputError(
        f"{differ}: ({', '.join(map(_shown, parameters))}) against ({', '.join(map(str, theirs))})",
        where=where,
        remedy="Declare the Kernel with the parameters of the source, in its order.",
    )


def _fits(parameter: Parameter, value: Value) -> bool:
    if (parameter.dims is not None) != value.pointer:
        return False
    if parameter.dims is None:
        return value.type in _SCALARS[_type(parameter)]
    return value.type in _ELEMENTS.get(_type(parameter), (value.type,))


def _type(parameter: Parameter) -> str:
    """ELEM, or the dtype of an array or scalar, or "tiles"."""
    if parameter.tiles is not None:
        return "tiles"
    if parameter.dims is not None:
        return "ELEM" if parameter.dtype is None else parameter.dtype.name
    return "int32" if parameter.cast is None else parameter.cast.__name__


def _shown(parameter: Parameter) -> str:
    return f"{_type(parameter)}{'[]' if parameter.dims is not None else ''} {parameter.name}"
