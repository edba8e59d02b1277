"""Reading small files of tokenizers: bounded, and every failure a TokenizerError."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import NoTokenizerError, TokenizerError
from ..file_kinds import HEAD, LFS, POINTER, kind_of
from ..files import open_plain, read_plain

_MAX_BYTES = 64 << 20  # far above any real tokenizer; bounds what a wrong file can cost


def is_file(path: Path) -> bool:
    """Whether there is such a file; a folder that may not be searched is an error."""
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from error


def read_file(path: Path) -> bytes:
    """The bytes of a file."""
    try:
        data = read_plain(path, _MAX_BYTES)
        if kind_of(data[:HEAD]) == LFS:
            raise TokenizerError(POINTER[0], where=str(path), remedy=POINTER[1])
        return data
    except OSError as error:
        raise _unreadable(path, error) from error
    except ValueError as error:
        raise broken(str(error), path) from error


def read_head(path: Path) -> bytes:
    """The first bytes of a file."""
    try:
        with open_plain(path) as file:
            return file.read(HEAD)
    except OSError as error:
        raise _unreadable(path, error) from error


def json_object(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds."""
    try:
        found = json.loads(read_file(path))
    except (ValueError, RecursionError) as error:
        raise broken(f"not JSON: {error}", path) from error
    if not isinstance(found, dict):
        raise broken("it is not a JSON object", path)
    return found


def is_id(value: Any) -> bool:
    """Whether this can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def broken(what: str, path: Path) -> TokenizerError:
    """The error for a file that is damaged."""
    return TokenizerError(
        f"the tokenizer file is broken: {what}"[:300],
        where=str(path),
        remedy="Download or copy it again.",
    )


def other_kind(what: str, path: Path) -> NoTokenizerError:
    """The error for a tokenizer that is whole and not GPT-2's."""
    return NoTokenizerError(
        what,
        where=str(path),
        remedy="Pass token ids, or tokenizer= with a byte-level BPE of GPT-2's kind.",
    )


def _unreadable(path: Path, error: OSError) -> TokenizerError:
    return TokenizerError(
        f"cannot read the tokenizer: {error.strerror}",
        where=str(path),
        remedy="Check that the file exists and may be read.",
    )
