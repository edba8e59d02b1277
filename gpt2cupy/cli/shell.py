"""Manners of the shell: what goes where, how errors look, how a command ends."""

from __future__ import annotations

import functools
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import typer

from ..errors import Gpt2CupyError, InputError
from ..output import with_nulls
from ..output import write as write  # for every command
from . import wording

if TYPE_CHECKING:  # the command line starts without it
    from ..generation.text import Completion
    from ..lm import LanguageModel

P = ParamSpec("P")

# Parameters of commands that hold text, not names of files.
_TEXTS = {"text", "prompt", "prompt_option", "stop"}

RED, DIM, PLAIN = "\033[31m", "\033[2m", "\033[0m"


def with_manners(command: Callable[P, None]) -> Callable[P, None]:
    """The command, ending as a shell user expects."""
    options = wording.options_of(command)

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        with _manners(options):
            for name in _TEXTS & kwargs.keys():
                _check_text(kwargs[name])
            command(*args, **kwargs)

    return wrapped


@contextmanager
def _manners(options: dict[str, str]) -> Iterator[None]:
    """Errors of ours as one line; a broken pipe or Ctrl-C as shells expect."""
    if sys.stdout is not None:
        # The text may hold characters that the terminal's encoding has not.
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, options)
        try:
            yield
            if sys.stdout is not None:
                sys.stdout.flush()
        except Gpt2CupyError as error:
            say(f"{paint('gpt2cupy:', RED)} {_one_line(wording.in_options(error, options))}")
            raise typer.Exit(2 if wording.is_usage(error, options) else 1) from None
        except BrokenPipeError:
            raise typer.Exit(141) from None
        except KeyboardInterrupt:
            if _colourful():
                say("")  # the shell's next line begins after ^C
            raise typer.Exit(130) from None


def say(text: str, *, quiet: bool = False) -> None:
    """A line for stderr."""
    if not quiet and sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def say_model(lm: LanguageModel, *, quantized: bool, quiet: bool) -> None:
    """The line on stderr that names the model and what it runs on."""
    in_int8 = " with matrices in int8" if quantized else ""
    say(paint(f"{lm.name}, {lm.dtype}{in_int8} on {lm.device}", DIM), quiet=quiet)


def extent(completion: Completion) -> str:
    """How long a text is and why it ended, for the heading above it."""
    count = len(completion.tokens)
    return f"{count} token{'s' if count != 1 else ''} ({completion.finish_reason})"


def paint(text: str, colour: str) -> str:
    """The text in a colour, where stderr shows colours."""
    return f"{colour}{text}{PLAIN}" if _colourful() else text


def _colourful() -> bool:
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stderr is not None and sys.stderr.isatty() and not plain


def _show_warning(
    options: dict[str, str], message: Warning | str, *place: Any, **more: Any
) -> None:
    say(f"gpt2cupy: warning: {wording.reworded(str(message), options)}")


def silence_warnings() -> None:
    """For ``--quiet``; until the command ends."""
    warnings.simplefilter("ignore")


def _one_line(error: Gpt2CupyError) -> str:
    """The error in one line; what is longer (a compiler's log) goes to a file that it names."""
    first, *more = error.what.splitlines() or [""]
    if not more:
        return " ".join(str(error).splitlines())
    short = Gpt2CupyError(first.rstrip(": "), where=error.where, remedy=error.remedy)
    try:
        handle, name = tempfile.mkstemp(prefix="gpt2cupy-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(f"{error}\n")
    except OSError:
        return str(error)  # better many lines than none
    return " ".join(f"{short} The log: {name}".splitlines())


def write_json(found: dict[str, Any]) -> None:
    """An object in a line; a number that JSON has not (NaN, infinity) is null."""
    write(json.dumps(with_nulls(found), allow_nan=False) + "\n")


# -- input ---------------------------------------------------------------------------------------


def read_text(argument: str | None, file: Path | None) -> str:
    """Text from the argument, a file, or stdin: where it is "-" or piped and nothing is given."""
    if argument not in (None, "-") and file is not None:
        raise typer.BadParameter("give the text or --file, not both")
    if file is not None and str(file) != "-":
        try:
            return decoded(file.read_bytes(), str(file))
        except OSError as error:
            raise InputError(
                f"the file cannot be read: {error.strerror}",
                where=str(file),
                remedy="Give a text file that you may read.",
            ) from error
    if argument is not None and argument != "-":
        return argument
    asked = argument == "-" or file is not None
    if sys.stdin is None or (not asked and sys.stdin.isatty()):
        return ""
    # In pieces: while one read() goes on to the end, Ctrl-C may have to wait for it.
    read: Callable[[int], bytes] = sys.stdin.buffer.read1  # type: ignore[union-attr]
    return decoded(b"".join(iter(lambda: read(1 << 16), b"")), "stdin")


def decoded(data: bytes, where: str) -> str:
    """Bytes of UTF-8 as text.

    Raises
    ------
    InputError
        If they are none.
    """
    try:
        return data.decode("utf-8").removeprefix("\ufeff")  # a byte order mark is not text
    except UnicodeDecodeError as error:
        raise InputError(
            f"byte {error.start} is not UTF-8",
            where=where,
            remedy="Convert the text first, for example with iconv -t UTF-8.",
        ) from error


def _check_text(given: Any) -> None:
    """Refuse bytes of an argument that are no text, which Python hands over as surrogates."""
    for text in given if isinstance(given, list) else [given]:
        if isinstance(text, str):
            decoded(text.encode("utf-8", "surrogateescape"), "argument")
