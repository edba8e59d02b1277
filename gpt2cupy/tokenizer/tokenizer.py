"""The tokenizer: a tiktoken Encoding built from local files, and a streaming decoder."""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import cast

import tiktoken

from ..errors import InputError, TokenizerError, kind_of, shown
from .files import read_folder, read_llmc, read_one_file
from .merging import Merger
from .reading import is_file
from .vocabulary import BYTE_SYMBOLS, END_OF_TEXT, WHITE_SPACE, AddedToken, Vocabulary

__all__ = ["BYTE_SYMBOLS", "END_OF_TEXT", "PATTERN", "StreamDecoder", "Tokenizer"]

# How GPT-2 cuts text into words before byte pairs are merged. Possessive where nothing can be
# given back, so that the regex engine keeps no stack for it.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++\z|\s+(?!\S)|\s"
# The rule \s+(?!\S) does keep a stack, of at most a million characters: longer runs of white
# space are cut where it would cut them. Python's \s has four control characters too many.
_SPACES = re.compile(f"[{WHITE_SPACE}]{{2,}}")
_LEADING = re.compile(f"[{WHITE_SPACE}]*")
_LONG = 100_000


class Tokenizer:
    """Byte-level BPE of GPT-2.

    Made by :meth:`from_path`, which reads every format there is, or by one of
    the other constructors. No file is ever downloaded.

    Attributes
    ----------
    vocab_size : int
        Largest id plus one. Ids that the model does not have are errors where they are met.
    ordinary_size : int
        The same of the tokens that any text may give, without added ones.
    specials : dict of str to int
        Added tokens and their ids.
    special_tokens : dict of str to int
        Ids of bos_token, eos_token, pad_token, unk_token and so on, those that the
        files name; GPT-2's own names stand for bos, eos and unk where transformers
        assumes them.
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
        self._merger = None
        if vocabulary.rules:
            alphabet = {texts[id_]: id_ for id_ in merged[:256]}
            self._merger = Merger([alphabet[bytes([i])] for i in range(256)], vocabulary.rules)
        self._texts = texts
        self._added = vocabulary.added
        self._prefix_space = vocabulary.prefix_space
        self.specials = {text: token.id for text, token in vocabulary.added.items()}
        self.special_tokens = dict(vocabulary.roles)
        self.vocab_size = max(texts) + 1
        self.ordinary_size = max([*merged, *(made for _, _, made in vocabulary.rules)]) + 1

    def __repr__(self) -> str:
        return f"<Tokenizer of {len(self._texts)} tokens, special {', '.join(self.specials)}>"

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer from a folder, a tokenizer.json or an llm.c tokenizer file.

        Raises
        ------
        NoTokenizerError
            If there is none, or it is of another kind than GPT-2's.
        TokenizerError
            If a file is missing, unreadable, broken, or does not fit another.
        """
        path = Path(path)
        one = path.suffix == ".json" or is_file(path)
        return cls(read_one_file(path)) if one else cls.from_folder(path)

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
        end = self.special_tokens.get("eos_token", self.specials.get(END_OF_TEXT))
        if end is None:
            raise TokenizerError(
                f"the vocabulary has no {END_OF_TEXT}",
                where="tokenizer",
                remedy="Give at least one token of prompt, or bos=False in score().",
            )
        return end

    def require(self) -> None:
        """Raise where there is no tokenizer, for what means nothing without text."""

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
        if not isinstance(text, str):
            raise InputError(
                f"a text cannot be {kind_of(text)}",
                where="text",
                remedy="Pass a string; decode bytes first.",
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        allowed = self._allowed(allowed_special)
        parts: list[str | AddedToken] = [text]
        # As in the tokenizers library, tokens that are normalized come second.
        for normalized in (False, True):
            tokens = [token for token in allowed if token.normalized is normalized]
            if tokens:
                parts = [
                    piece
                    for part in parts
                    for piece in (_split(part, tokens) if isinstance(part, str) else (part,))
                ]
        ids: list[int] = []
        for part in parts:
            if isinstance(part, str):
                ids += self._encode_words(part)
            else:
                ids.append(part.id)
        return ids

    def _encode_words(self, text: str) -> list[int]:
        if self._prefix_space and text and not text.startswith(" "):
            text = f" {text}"
        if self._merger is not None:
            return self._merger.encode(text)
        found: list[int] = []
        for part in _without_long_spaces(text):
            found += self._encoding.encode_ordinary(part)
        return found if self._ids is None else [self._ids[rank] for rank in found]

    def _allowed(self, names: str | Collection[str]) -> list[AddedToken]:
        if isinstance(names, str) and names == "all":
            return list(self._added.values())
        try:
            chosen = frozenset() if isinstance(names, str) else frozenset(names)
        except TypeError:  # no collection, or not of strings
            chosen = frozenset([""])
        if (
            names not in ("", "none")
            if isinstance(names, str)
            else not chosen <= self.specials.keys()
        ):
            raise InputError(
                f"no special tokens {shown(names)}",
                where="allowed_special",
                remedy=f"Use 'none', 'all', or some of {sorted(self.specials)}.",
            )
        return [t for t in self._added.values() if t.text in chosen or not t.special]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Bytes of ids, which need not be whole characters."""
        try:
            return b"".join([self._texts[id_] for id_ in ids])
        except TypeError as error:
            raise TokenizerError(
                f"token ids must be integers, not {shown(ids)}",
                where="decode",
                remedy="Pass a list of integers.",
            ) from error
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


def _split(text: str, tokens: Collection[AddedToken]) -> Iterator[str | AddedToken]:
    """The text cut before and after each of the tokens, without empty parts."""
    by_text = {token.text: token for token in tokens if token.text in text}
    # Of several that begin at one place the longest is meant.
    longest_first = sorted(by_text, key=len, reverse=True)
    start = 0
    for match in re.finditer("|".join(map(re.escape, longest_first)), text) if by_text else ():
        token = by_text[match[0]]
        if token.single_word:
            raise InputError(
                f"the text has {token.text!r}, which the tokenizer takes for a token only as a "
                "word of its own; that is not supported",
                where="text",
                remedy="Pass token ids, or a tokenizer whose added tokens are not single_word.",
            )
        plain = text[start : match.start()]
        plain = plain.rstrip(WHITE_SPACE) if token.lstrip else plain
        if plain:
            yield plain
        yield token
        start = max(start, match.end())
        if token.rstrip:
            start = cast("re.Match[str]", _LEADING.match(text, start)).end()
    if start < len(text):
        yield text[start:]


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

    @property
    def pending(self) -> bool:
        """Whether a character has begun and not ended."""
        return bool(self._utf8.getstate()[0])

    def flush(self) -> str:
        """What remains at the end: U+FFFD for an unfinished character."""
        return self._utf8.decode(b"", final=True)
