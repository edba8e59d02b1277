"""What stands in the place of a tokenizer that a model does not have."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..errors import NoTokenizerError
from .tokenizer import StreamDecoder, Tokenizer


class NoTokenizer(Tokenizer):
    """Stands where a model's tokenizer cannot be read: ids pass, text raises and says why.

    Parameters
    ----------
    reason : NoTokenizerError
    """

    def __init__(self, reason: NoTokenizerError) -> None:
        self.reason = reason
        self.specials = {}
        self.special_tokens = {}
        self.vocab_size = self.ordinary_size = 0

    def __repr__(self) -> str:
        return f"<NoTokenizer: {self.reason.what}>"

    def _raise(self) -> NoTokenizerError:
        return NoTokenizerError(
            f"the model has no tokenizer, so it takes and returns token ids: {self.reason.what}",
            where=self.reason.where,
            remedy=self.reason.remedy,
        )

    @property
    def eot_token(self) -> int:
        raise self._raise()

    def require(self) -> None:
        raise self._raise()

    def encode(self, text: str, *, allowed_special: str | Collection[str] = "none") -> list[int]:
        raise self._raise()

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        raise self._raise()

    def stream(self) -> StreamDecoder:
        return _NoText(self)


class _NoText(StreamDecoder):
    """The text of ids that no tokenizer knows: none."""

    pending = False

    def push(self, id_: int) -> str:
        return ""

    def flush(self) -> str:
        return ""
