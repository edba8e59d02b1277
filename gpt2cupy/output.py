"""Writing what a command found: an error of this package where stdout or a file takes no more."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import Gpt2CupyError


@contextlib.contextmanager
def stdout_errors() -> Iterator[None]:
    """What fails while stdout is written; a reader that went away stays BrokenPipeError.

    Raises
    ------
    Gpt2CupyError
        If stdout is closed, or takes no more.
    """
    try:
        if sys.stdout is None:
            raise OSError(None, "it is closed")
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise Gpt2CupyError(
            f"the output cannot be written: {error.strerror}",
            where="stdout",
            remedy="Free space on the disk, or send the output elsewhere.",
        ) from error


@contextlib.contextmanager
def file_errors(path: Path, what: str) -> Iterator[None]:
    """What fails while ``path`` is written: ``what`` says what was to stand in it.

    Raises
    ------
    Gpt2CupyError
    """
    try:
        yield
    except OSError as error:
        raise Gpt2CupyError(
            f"{what} cannot be written: {error.strerror or error}",
            where=str(path),
            remedy="Free space on the disk, or name a file elsewhere.",
        ) from error


def write(text: str) -> None:
    """Text for stdout, now: nothing is left that could fail when the interpreter ends."""
    with stdout_errors():
        sys.stdout.write(text)
        sys.stdout.flush()


def with_nulls(value: Any) -> Any:
    """What JSON is made of, with null for numbers that JSON has not (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: with_nulls(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_writable(path: Path, flag: str) -> None:
    """Raise an error unless the file can be written; leaves none behind that was not there."""
    existed = os.path.lexists(path)
    try:
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        raise Gpt2CupyError(
            f"{path} cannot be written: {error.strerror}",
            where=flag,
            remedy="Name a file in a folder that exists and is yours.",
        ) from error
