"""Errors in the words of the shell: a parameter of Python is the option that was typed."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Any

from typer.models import OptionInfo

from ..errors import Gpt2CupyError, InputError

# A value as errors show it: quoted, in parentheses, or up to what ends a word or a sentence.
_VALUE = r"=('[^']*'|\([^)]*\)|[^\s,;]*[^\s,;.])?"


def options_of(command: Callable[..., Any]) -> dict[str, str]:
    """The options of a command by the names of its parameters."""
    found = {}
    # Not typing.get_type_hints: in Python 3.10 it hides what has the default None in an Optional.
    for name, hint in inspect.get_annotations(command, eval_str=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                # typer keeps the first flag of an Annotated option as its default.
                flags = [str(flag) for flag in (info.default, *(info.param_decls or ()))]
                long = [flag for flag in flags if flag.startswith("--")]
                found[name] = long[0] if long else f"--{name.replace('_', '-')}"
    # What the library calls them.
    for ours, theirs in (("path", "decode"), ("model", "name_or_path")):
        if ours in found:
            found.setdefault(theirs, found[ours])
    return found


def reworded(text: str, options: dict[str, str]) -> str:
    """``top_p=2.0`` as ``--top-p 2.0``, ``max_new_tokens`` as ``--max-new-tokens``."""

    def with_value(match: re.Match[str]) -> str:
        value = re.sub(r"^\(('[^']*'),\)$", r"\1", match[2] or "")  # one of an option's several
        if re.fullmatch(r"'[\w.:-]+'", value):
            value = value[1:-1]
        return f"{options[match[1]]} {value}".rstrip()

    if not options:
        return text
    text = re.sub(rf"(?<![\w-])({'|'.join(options)}){_VALUE}", with_value, text)
    # A name of one word is a word of English too.
    if long := [name for name in options if "_" in name]:
        text = re.sub(rf"(?<![\w-])({'|'.join(long)})(?!\w)", lambda m: options[m[1]], text)
    # A shell has no None: it leaves the option out.
    return text.replace(", or None", "")


def _argument(where: str) -> str:
    """The argument that an error is about, without the call that it is one of."""
    return re.sub(r"^[A-Za-z_.]+: (?=\w+$)", "", where)


def is_usage(error: Gpt2CupyError, options: dict[str, str]) -> bool:
    """Whether the value of an option is at fault, not a text, a file or the machine."""
    place = _argument(error.where)
    named = place in options or place in options.values()
    return isinstance(error, InputError) and (
        named or error.where in ("SamplingParams", "score", "profile")
    )


def in_options(error: Gpt2CupyError, options: dict[str, str]) -> Gpt2CupyError:
    """The error, naming options where it names parameters that the command has as options."""
    what, where = error.what, _argument(error.where)
    if where in options:
        what = re.sub(rf"^{where}(?= )", options[where], what)
    where = options.get(where, "" if where == "SamplingParams" else reworded(where, options))
    what, remedy = (reworded(text, options) for text in (what, error.remedy))
    return Gpt2CupyError(what, where=where, remedy=remedy)
