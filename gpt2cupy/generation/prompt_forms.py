"""What a user passes as prompts: text or token ids of any kind, one or several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import InputError, kind_of, shown
from ..ids import as_host
from ..tokenizer import Tokenizer


def is_one(prompt: Any) -> bool:
    """Whether this is one prompt, text or token ids, rather than a list of prompts."""
    prompt = _opened(prompt)
    if isinstance(prompt, str):
        return True
    if not _is_sequence(prompt):
        raise _wrong_kind(prompt)
    if isinstance(prompt, np.ndarray):
        return prompt.ndim < 2 and not (prompt.size and isinstance(prompt.flat[0], str))
    # No prompts at all is an empty list of them; an empty one is written "".
    return len(prompt) > 0 and not (isinstance(prompt[0], str) or _is_sequence(_opened(prompt[0])))


def several(prompts: Any) -> list[Any]:
    """The prompts of a list of them, of rows of ids, or of what a tokenizer returned."""
    return list(_opened(prompts))


def place_of(number: int, prompt: Any) -> str:
    """Which of several prompts: its number and how it begins."""
    return f"prompt {number}, {shown(prompt, 24)}"


def to_ids(prompt: Any, tokenizer: Tokenizer) -> Sequence[Any] | np.ndarray:
    """Token ids of a text, or those given; their values are not yet checked."""
    prompt = _opened(prompt)
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)
    if not _is_sequence(prompt):
        raise _wrong_kind(prompt)
    return prompt


def only_ids(ids: Any) -> Sequence[Any] | np.ndarray:
    """Token ids as given, where text means nothing; their values are not yet checked."""
    opened = _opened(ids)
    if isinstance(opened, str) or not _is_sequence(opened):
        raise InputError(
            f"token ids to decode cannot be {kind_of(ids)}",
            where="decode",
            remedy="Pass a list of token ids.",
        )
    return opened


def _opened(value: Any) -> Any:
    """Ids as a host array where a tensor holds them, or rows of them from a BatchEncoding."""
    if isinstance(value, Mapping) and "input_ids" in value:
        ids, mask = as_host(value["input_ids"]), value.get("attention_mask")
        try:
            return ids if mask is None else _unpadded(ids, as_host(mask))
        except (TypeError, ValueError) as error:
            raise InputError(
                f"attention_mask does not fit input_ids: {error}",
                where="prompt",
                remedy="Pass both as the tokenizer returned them.",
            ) from error
    return as_host(value)


def _unpadded(ids: Any, mask: Any) -> Any:
    """What an attention mask leaves of ids: one list of them, or several."""
    if len(ids) and _is_sequence(ids[0]):
        return [_kept(row, kept) for row, kept in zip(ids, mask, strict=True)]
    return _kept(ids, mask)


def _kept(ids: Any, mask: Any) -> list[Any]:
    return [id_ for id_, kept in zip(ids, mask, strict=True) if kept]


def _is_sequence(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    # Bytes are sequences of integers, but nobody means them as token ids.
    other = str | bytes | bytearray | memoryview
    return isinstance(value, Sequence) and not isinstance(value, other)


def _wrong_kind(prompt: Any) -> InputError:
    return InputError(
        f"a prompt cannot be {kind_of(prompt)}",
        where="prompt",
        remedy="Pass text, token ids, or a list of either; decode bytes first.",
    )
