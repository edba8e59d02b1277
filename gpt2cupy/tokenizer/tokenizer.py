"""The tokenizer: a tiktoken Encoding built from local files, and a streaming decoder."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import tiktoken

from ..errors import InputError, TokenizerError
from .files import is_file, read_folder, read_llmc, read_tokenizer_json
from .vocabulary import BYTE_SYMBOLS, END_OF_TEXT, Vocabulary

__all__ = ["BYTE_SYMBOLS", "END_OF_TEXT", "PATTERN", "StreamDecoder", "Tokenizer"]

# How GPT-2 cuts text into words before byte pairs are merged. Possessive where nothing can be
# given back, so that the regex engine keeps no stack for it.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
# The rule \s+(?!\S) does keep a stack, of at most a million characters: longer runs of white
# space are cut where it would cut them. Python's \s has four control characters too many.
_SPACES = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]{2,}")
_LONG = 100_000


class Tokenizer:
    """Byte-level BPE of GPT-2.

    Made by :meth:`from_path`, which reads every format there is, or by one of
    the other constructors. No file is ever downloaded.

    Attributes
    ----------
    vocab_size : int
        Largest id plus one. A model with fewer rows than this cannot use the tokenizer.
    specials : dict of str to int
        Added tokens and their ids.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        merged, texts = vocabulary.merged, vocabulary.texts
        # tiktoken takes a token's rank for its id: translate where they differ.
        self._ids = None if merged == list(range(len(merged))) else merged
        self._encoding = tiktoken.Encoding(
            "gpt2cupy",
            pat_str=PATTERN,
            mergeable_ranks={texts[id_]: rank for rank, id_ in enumerate(merged)},
            special_tokens={},
        )
        self._texts = texts
        self._always = vocabulary.always
        self._end = vocabulary.end
        self.specials = dict(vocabulary.added)
        self.vocab_size = max(texts) + 1

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer from a folder, a tokenizer.json or an llm.c tokenizer file.

        Raises
        ------
        TokenizerError
            If a file is missing, unreadable, broken, does not fit another, or
            is not GPT-2's kind of tokenizer.
        """
        path = Path(path)
        if path.suffix == ".json":
            return cls(read_tokenizer_json(path))
        return cls.from_llmc(path) if is_file(path) else cls.from_folder(path)

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read tokenizer.json, or vocab.json + merges.txt, or encoder.json + vocab.bpe."""
        return cls(read_folder(Path(path)))

    @classmethod
    def from_llmc(cls, path: str | Path) -> Tokenizer:
        """Read llm.c's gpt2_tokenizer.bin, version 1 or 2."""
        return cls(read_llmc(Path(path)))

    @property
    def eot_token(self) -> int:
        """Id of the end-of-text token."""
        if self._end not in self.specials:
            raise TokenizerError(
                f"the vocabulary has no {self._end}",
                where="tokenizer",
                remedy="Give at least one token of prompt, or bos=False in score().",
            )
        return self.specials[self._end]

    def encode(self, text: str, *, allowed_special: str | Collection[str] = "none") -> list[int]:
        """Ids of a text.

        Parameters
        ----------
        text : str
            Lone surrogates, which have no UTF-8, become U+FFFD.
        allowed_special : str or collection of str
            Special tokens that stand for themselves where the text contains
            them: "none", "all", or some by name. The others are plain text.

        Raises
        ------
        InputError
            If ``allowed_special`` names a token that does not exist.
        """
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        allowed = self._allowed(allowed_special)
        ids: list[int] = []
        for part in _split(text, allowed):
            if part in allowed:
                ids.append(self.specials[part])
            else:
                ids += self._encode_words(part)
        return ids

    def _encode_words(self, text: str) -> list[int]:
        found: list[int] = []
        for part in _without_long_spaces(text):
            found += self._encoding.encode_ordinary(part)
        return found if self._ids is None else [self._ids[rank] for rank in found]

    def _allowed(self, names: str | Collection[str]) -> frozenset[str]:
        if names == "all":
            return frozenset(self.specials)
        chosen = frozenset() if names == "none" else frozenset(names)
        if (isinstance(names, str) and chosen) or not chosen <= self.specials.keys():
            raise InputError(
                f"no special tokens {names!r}",
                where="allowed_special",
                remedy=f"Use 'none', 'all', or some of {sorted(self.specials)}.",
            )
        return chosen | self._always

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, which need not be whole characters."""
        try:
            return b"".join([self._texts[id_] for id_ in ids])
        except KeyError as error:
            raise TokenizerError(
                f"token id {error} is not in the vocabulary",
                where="decode",
                remedy=f"The largest id is {self.vocab_size - 1}.",
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self)


def _split(text: str, tokens: Collection[str]) -> list[str]:
    """The text cut before and after each of the tokens."""
    if not any(token in text for token in tokens):
        return [text]
    # Of several that begin at one place the longest is meant.
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.split(f"({'|'.join(map(re.escape, longest_first))})", text)


def _without_long_spaces(text: str) -> Iterator[str]:
    """The text in parts that encode as the whole does, none with a long run inside.

    Before a word a run of white space gives all but its last character; at the
    end of a text all of it. So it may be cut before its last character.
    """
    start = 0
    if len(text) > _LONG:
        for run in _SPACES.finditer(text):
            if run.end() - run.start() > _LONG and run.end() < len(text):
                yield text[start : run.end() - 1]
                start = run.end() - 1
    yield text[start:]


class StreamDecoder:
    """Gives the text of ids as they come, never a part of a character.

    All that :meth:`push` and :meth:`flush` return, joined, is what
    :meth:`Tokenizer.decode` gives for all the ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id_: int) -> str:
        """The text that this id completes, maybe none."""
        return self._utf8.decode(self._tokenizer.decode_bytes([id_]))

    def flush(self) -> str:
        """What remains at the end: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)
