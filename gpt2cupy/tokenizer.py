"""The tokenizer: a tiktoken Encoding built from local files, and a streaming decoder."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from pathlib import Path

import tiktoken

from .errors import TokenizerError

END_OF_TEXT = "<|endoftext|>"
# How GPT-2 cuts text into words before byte pairs are merged.
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


def _byte_symbols() -> dict[str, int]:
    """GPT-2 writes bytes as printable characters: the character of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if byte not in printable]
    return symbols | {chr(256 + place): byte for place, byte in enumerate(hidden)}


BYTE_SYMBOLS = _byte_symbols()


class Tokenizer:
    """Byte-level BPE of GPT-2.

    Parameters
    ----------
    ranks : dict of bytes to int
        Every mergeable token's bytes by merge order: single bytes first.
    ids : dict of bytes to int
        Its id in the vocabulary.
    specials : dict of str to int
        Special tokens and their ids.
    """

    def __init__(
        self, ranks: dict[bytes, int], ids: dict[bytes, int], specials: dict[str, int]
    ) -> None:
        # tiktoken takes a token's rank for its id: translate where they differ.
        identical = ranks == ids
        self._to_id = None if identical else [ids[token] for token in ranks]
        offset = len(ranks)
        inner = specials if identical else {s: offset + i for i, s in enumerate(specials)}
        self._encoding = tiktoken.Encoding(
            "gpt2cupy", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=inner
        )
        if self._to_id is not None:
            self._to_id += list(specials.values())
        self._bytes = {id_: token for token, id_ in ids.items()}
        self._bytes |= {id_: text.encode() for text, id_ in specials.items()}
        self.specials = dict(specials)
        self.vocab_size = max(self._bytes) + 1

    @property
    def eot_token(self) -> int:
        """Id of the end-of-text token."""
        if END_OF_TEXT not in self.specials:
            raise TokenizerError(
                f"the vocabulary has no {END_OF_TEXT}", remedy="Give at least one token."
            )
        return self.specials[END_OF_TEXT]

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Read vocab.json and merges.txt from a folder.

        Raises
        ------
        TokenizerError
            If a file is missing, broken, or does not fit the other.
        """
        folder = Path(path)
        try:
            vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
            merges = (folder / "merges.txt").read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise TokenizerError(
                f"cannot read the tokenizer: {error}",
                where=str(folder),
                remedy="The folder needs vocab.json and merges.txt; or pass tokenizer=.",
            ) from error
        return cls.from_bpe(vocab, merges.splitlines(), where=str(folder))

    @classmethod
    def from_bpe(cls, vocab: dict[str, int], merges: list[str], *, where: str) -> Tokenizer:
        """Build from a vocabulary (printable symbols to ids) and merge lines in order."""
        try:
            ids = {
                bytes(BYTE_SYMBOLS[c] for c in token): id_
                for token, id_ in vocab.items()
                if token != END_OF_TEXT
            }
            ranks = {bytes([byte]): rank for rank, byte in enumerate(BYTE_SYMBOLS.values())}
            for line in merges:
                if line and not line.startswith("#version"):
                    left, right = line.split(" ")
                    token = bytes(BYTE_SYMBOLS[c] for c in left + right)
                    ranks.setdefault(token, len(ranks))
        except (KeyError, ValueError) as error:
            raise TokenizerError(
                f"not byte-level BPE files: {error!r}", where=where, remedy="Restore the files."
            ) from error
        if ranks.keys() != ids.keys():
            odd = next(iter(ranks.keys() ^ ids.keys()))
            raise TokenizerError(
                f"merges and vocabulary do not fit: {odd!r} stands in only one of them",
                where=where,
                remedy="Take both files from the same checkpoint.",
            )
        specials = {END_OF_TEXT: vocab[END_OF_TEXT]} if END_OF_TEXT in vocab else {}
        return cls(ranks, ids, specials)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text; special tokens in it are plain text unless allowed."""
        # A lone surrogate has no UTF-8; like Hugging Face, take U+FFFD for it.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        allowed = set(self.specials) if allow_special else set()
        found = self._encoding.encode(text, allowed_special=allowed, disallowed_special=())
        return found if self._to_id is None else [self._to_id[rank] for rank in found]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join(self._bytes[id_] for id_ in ids)
        except KeyError as error:
            raise TokenizerError(
                f"token id {error} is not in the vocabulary",
                where="decode",
                remedy=f"Ids go from 0 to {self.vocab_size - 1}.",
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)


class StreamDecoder:
    """Gives the text of ids as they come, never a part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The text that this id completes, maybe none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([id_]))

    def flush(self) -> str:
        """What remains at the end: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)
