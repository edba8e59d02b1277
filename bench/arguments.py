"""The arguments of the benchmarks: what cannot be measured is said before anything is."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

from gpt2cupy import GPT2Config, output, record
from gpt2cupy.cli import wording
from gpt2cupy.errors import Gpt2CupyError, InputError
from gpt2cupy.loading import resolve_device


def names(text: str) -> list[str]:
    """A list of an option, separated by commas."""
    return [part for part in text.split(",") if part]


def numbers(text: str) -> list[int]:
    return [int(part) for part in names(text)]


def parser(
    doc: str | None, out: str, devices: tuple[str, ...] = ("cuda", "cpu")
) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument(
        "--device", default="cuda", choices=devices, help="cpu is for trying the script"
    )
    made.add_argument("--out", type=Path, default=record.RESULTS / out, help="the record")
    return made


def parsed(
    options: argparse.ArgumentParser, least: Mapping[str, int] | None = None
) -> argparse.Namespace:
    """The arguments, checked."""
    return checked(options.parse_args(), least)


def checked(args: argparse.Namespace, least: Mapping[str, int] | None = None) -> argparse.Namespace:
    """The arguments, if numbers, device and record can be as they say.

    Parameters
    ----------
    args : Namespace
        With ``device`` and ``out``; no list in it may be empty.
    least : mapping of name to int, optional
        The smallest value of an argument; 1 where it is not in it.

    Raises
    ------
    InputError
        If a number is too small, a list is empty, or the record cannot be written.
    DeviceError
        If a GPU is asked for and there is none.
    """
    for name, value in vars(args).items():
        smallest = (least or {}).get(name, 1)
        if value == []:
            raise InputError(
                "the list is empty", where=flag(name), remedy="Name something or leave it out."
            )
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, int) and not isinstance(each, bool) and each < smallest:
                raise InputError(
                    f"{each} is too small", where=flag(name), remedy=f"Give {smallest} or more."
                )
    resolve_device(args.device)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{args.out.parent} cannot be made: {error.strerror}",
            where="--out",
            remedy="Name a file in a folder that is yours.",
        ) from error
    output.check_writable(args.out, "--out")
    return args


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def check_fits(config: GPT2Config, model: str, tokens: int, what: str) -> None:
    """Raise InputError if a sequence of so many tokens, asked for by ``what``, is too long."""
    if tokens > config.n_positions:
        raise InputError(
            f"{what}: {tokens} tokens exceed the context of {config.n_positions}",
            where=f"--model {model}",
            remedy="Ask for fewer.",
        )


def chosen(wanted: list[str], known: Any, what: str) -> list[str]:
    """``wanted`` if every name is known, else an error that lists what there is."""
    for name in wanted:
        if name not in known:
            raise InputError(
                f"unknown {what} {name!r}", remedy=f"There are: {', '.join(known) or 'none'}."
            )
    return wanted


def main(run: Callable[[], None]) -> None:
    """Run a script; an error of gpt2cupy is one line, in the words of the shell."""
    try:
        run()
    except Gpt2CupyError as error:
        options = {"device": "--device"}
        script = Path(sys.argv[0])
        name = script.parent.name if script.stem == "__main__" else script.name
        sys.exit(f"{name}: {wording.in_options(error, options)}")
