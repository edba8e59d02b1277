"""Write docs/api.md from the docstrings of the public names: `make docs`.

Docstrings are read from the source by griffe, so neither a GPU nor CuPy is needed.
`--check` writes nothing and fails if the page is stale.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

import gpt2cupy

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "api.md"
INTRO = """# The Python API

Every public name, the interfaces below them, and the errors. This page is made from the docstrings
by `make docs`; change those, not this page.
"""
# The interfaces below the public names, for those who write engines or kernels of their own.
INTERFACES = (
    *("Weights", "KVCache", "DecodeState", "Engine", "Request", "Token"),
    *("Kernel", "launch"),
)
# What the public names hand out, beside them.
FURTHER = ("GenerationConfig", "Tokenizer", "StreamDecoder")
# Members that other modules of the package call and no user does.
INTERNAL = {
    "GPT2": {"backend", "forward", "hidden", "run_packed"},
    "SamplingParams": {
        *("banned", "counts_tokens", "greedy", "limit", "must_fit", "plain", "without_effect"),
    },
    "GenerationConfig": {"beside", "described", "from_dict"},
    "DecodeState": {"plain", "shaped"},
}
WIDTH = 88


def page() -> str:
    """The whole page."""
    package = griffe.load("gpt2cupy", search_paths=[ROOT], docstring_parser="numpy")
    # Functions first, then classes, each in alphabetical order.
    names = sorted(gpt2cupy._PUBLIC.items(), key=lambda item: (item[0][0].isupper(), item[0]))
    parts = [INTRO]
    for name, module in names:
        parts += _object(package[f"{module}.{name}"], f"gpt2cupy.{name}", 2)
    parts.append(
        "## Interfaces\n\nBelow the public names; docs/how-it-works.md shows them at work.\n"
    )
    for name in INTERFACES:
        thing = _defined(package, name)
        parts += _object(thing, _path(thing), 3)
        if name == "Weights":  # the table of its arrays stands in the module's docstring
            parts.append(f"```text\n{thing.parent.docstring.value}\n```\n")
    parts.append("## Further classes\n\nReached through the names above.\n")
    for name in FURTHER:
        thing = _defined(package, name)
        parts += _object(thing, _path(thing), 3)
    parts.append("## gpt2cupy.errors\n")
    for name, error in package["errors"].members.items():
        if not error.is_alias and error.is_class and name not in gpt2cupy.__all__:
            parts += _object(error, f"gpt2cupy.errors.{name}", 3)
    return "\n".join([INTRO, _contents(parts[1:]), *parts[1:]])


def _contents(parts: list[str]) -> str:
    """Links to the headings of the second and third level that name something."""
    links = []
    for part in parts:
        heading = re.fullmatch(r"###? (gpt2cupy\.\S+)\n", part)
        if heading and "errors." not in heading[1]:
            anchor = re.sub(r"[^\w-]", "", heading[1].lower())
            links.append(f"[{heading[1].rpartition('.')[2]}](#{anchor})")
    return f"{', '.join(links)}.\n"


def _defined(module: griffe.Module, name: str) -> griffe.Object:
    """The class or function of this name, wherever in the package it is defined."""
    found = list(_definitions(module, name))
    if len(found) != 1:
        raise LookupError(
            f"{len(found)} definitions of {name}, which this script lists, in gpt2cupy"
        )
    return found[0]


def _definitions(module: griffe.Module, name: str) -> Iterator[griffe.Object]:
    for key, member in module.members.items():
        if member.is_alias:
            continue
        if member.is_module:
            yield from _definitions(member, name)
        elif key == name and (member.is_class or member.is_function):
            yield member


def _path(thing: griffe.Object) -> str:
    """Where users import it from: its package, if that hands it out, else its module."""
    package = thing.parent.parent
    handed = package.members.get(thing.name) if package is not None and package.parent else None
    return f"{package.path}.{thing.name}" if handed is not None and handed.is_alias else thing.path


def _object(thing: griffe.Object, title: str, level: int) -> Iterator[str]:
    """A heading, the signature, the docstring, and a class's public members."""
    yield f"{'#' * level} {title}\n"
    if thing.is_attribute:
        yield f"Property, `{thing.annotation}`.\n" if thing.annotation else "Property.\n"
    else:
        yield f"```py\n{_signature(thing)}\n```\n"
    for section in thing.docstring.parsed if thing.docstring else ():
        yield _section(section)
    if thing.is_class:
        for name, member in _members(thing).items():
            private = name.startswith("_") and name != "__call__"
            private = private or name in INTERNAL.get(thing.name, ())
            if not private and (member.is_function or "property" in member.labels):
                yield from _object(member, f"{thing.name}.{name}", level + 1)


def _members(thing: griffe.Class) -> dict[str, griffe.Object]:
    """Members of a class, after those of bases that the page does not show."""
    found: dict[str, griffe.Object] = {}
    for base in (*reversed(thing.mro()), thing):
        if base is thing or base.name not in (*gpt2cupy._PUBLIC, *INTERFACES, *FURTHER):
            found |= base.members
    return found


def _signature(thing: griffe.Object) -> str:
    if thing.is_class and not thing.parameters:
        bases = ", ".join(str(base) for base in thing.bases)
        return f"class {thing.name}({bases})" if bases else f"class {thing.name}"
    kinds = griffe.ParameterKind
    shown = [p for p in thing.parameters if p.name not in ("self", "cls")]
    parts: list[str] = []
    starred = any(p.kind is kinds.var_positional for p in shown)
    for parameter in shown:
        if parameter.kind is kinds.keyword_only and not starred:
            parts.append("*")
            starred = True
        stars = {kinds.var_positional: "*", kinds.var_keyword: "**"}.get(parameter.kind, "")
        part = f"{stars}{parameter.name}"
        if parameter.annotation is not None:
            part += f": {parameter.annotation}"
        if parameter.default is not None and not stars:
            part += f" = {parameter.default}" if parameter.annotation else f"={parameter.default}"
        parts.append(part)
    start = f"class {thing.name}" if thing.is_class else thing.name
    end = "" if thing.is_class or thing.returns is None else f" -> {thing.returns}"
    line = f"{start}({', '.join(parts)}){end}"
    if len(line) <= WIDTH:
        return line
    return f"{start}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"


def _section(section: griffe.DocstringSection) -> str:
    kind = section.kind.value
    if kind == "text":
        return f"{_markdown(section.value)}\n"
    title = section.title or {"parameters": "Parameters"}.get(kind, kind.capitalize())
    if kind not in ("parameters", "attributes", "returns", "yields", "raises"):
        raise ValueError(f"a docstring has a section that this script does not know: {kind}")
    return f"**{title}**\n\n" + "".join(_item(entry) for entry in section.value)


def _item(entry: griffe.DocstringElement) -> str:
    name = getattr(entry, "name", "")
    kind = str(entry.annotation) if entry.annotation is not None else ""
    # Choices, written {"a", "b"} in the docstring, come as a tuple.
    kind = kind.strip("()").replace("', '", "' or '") if kind.startswith("('") else kind
    head = f"`{name}`" + (f" (`{kind}`)" if kind else "") if name else f"`{kind}`"
    text = _markdown(" ".join((entry.description or "").split()))
    return f"- {head}: {text}\n" if text else f"- {head}\n"


def _markdown(text: str) -> str:
    """Roles and double backticks of reStructuredText as Markdown's code."""
    text = re.sub(r":[a-z]+:`~?([^`]+)`", r"`\1`", text)
    return text.replace("``", "`").strip()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is stale")
    check = parser.parse_args().check
    text = page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/api.md is not what the docstrings say; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
