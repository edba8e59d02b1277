"""What tokens add to a text, as bytes of a JSON string."""

from __future__ import annotations

import msgspec

from ..errors import TokenizerError
from ..generation.text import GrowingText
from ..tokenizer import Tokenizer


class TokenText(dict[int, bytes]):
    """Tokens that are whole characters, by id, as they stand in a JSON string.

    A token that is not, and an id that has no text, raises KeyError. Filled as ids are met.

    Parameters
    ----------
    tokenizer : Tokenizer
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, id_: int) -> bytes:
        try:
            text = self.tokenizer.decode_bytes([id_]).decode()
        except (TokenizerError, UnicodeDecodeError):
            raise KeyError(id_) from None
        self[id_] = found = in_json(text)
        return found


class JsonText:
    """A text that grows without stop strings, as bytes of a JSON string."""

    def __init__(self, tokens: TokenText) -> None:
        self._tokens = tokens
        self._growing: GrowingText | None = None  # while a character is incomplete

    def push(self, ids: list[int]) -> bytes:
        """What ids add."""
        if self._growing is None:
            tokens = self._tokens
            try:
                if len(ids) == 1:
                    return tokens[ids[0]]
                return b"".join([tokens[id_] for id_ in ids])
            except KeyError:
                self._growing = GrowingText(tokens.tokenizer, ())
        growing = self._growing
        text = "".join(map(growing.decode, ids))
        if not growing.decoder.pending:
            self._growing = None
        return in_json(text)

    def flush(self) -> bytes:
        """What remains at the end of the text."""
        return b"" if self._growing is None else in_json(self._growing.decoder.flush())


def in_json(text: str) -> bytes:
    """A text as it stands between the quotes of a JSON string."""
    return msgspec.json.encode(text)[1:-1]
