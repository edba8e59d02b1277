"""Reading tokenizers: every file format of GPT-2's byte-level BPE becomes one ``Vocabulary``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import NoTokenizerError, TokenizerError
from ..file_kinds import LLMC, LLMC_TOKENIZER, LLMC_TOKENIZER_MAGIC, SAFETENSORS, TORCH, kind_of
from . import tokenizer_json
from .added_tokens import Added, read_added
from .reading import broken, is_file, is_id, json_object, other_kind, read_file, read_head
from .vocabulary import BYTE_SYMBOLS, AddedToken, Vocabulary, reachable, token_texts

_LLMC_HEADER = 256 * 4
_OTHERS = {
    "vocab.txt": "the vocabulary of a WordPiece tokenizer, which is not read",
    "tokenizer.model": "a sentencepiece model, which is not read",
    "spiece.model": "a sentencepiece model, which is not read",
    "vocab.json": "and no merges.txt",
}
_PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def read_folder(folder: Path) -> Vocabulary:
    """tokenizer.json where there is one, as Hugging Face does, else a vocabulary and merges."""
    if is_file(folder / "tokenizer.json"):
        return read_tokenizer_json(folder / "tokenizer.json")
    for vocab_name, merges_name in _PAIRS:
        if is_file(folder / vocab_name) and is_file(folder / merges_name):
            return _read_pair(folder / vocab_name, folder / merges_name)
    if not folder.exists():
        raise TokenizerError(
            "there is no such file or folder",
            where=str(folder),
            remedy="Pass tokenizer= with a folder, a tokenizer.json or an llm.c tokenizer file.",
        )
    for name, meaning in _OTHERS.items():
        if is_file(folder / name):
            raise other_kind(f"the folder has {name}, {meaning}", folder)
    raise NoTokenizerError(
        "the folder has no tokenizer",
        where=str(folder),
        remedy="It needs tokenizer.json, or vocab.json and merges.txt, or encoder.json and "
        "vocab.bpe; or pass tokenizer= with the place of one, or token ids.",
    )


def read_one_file(path: Path) -> Vocabulary:
    """A file that is a tokenizer by itself: tokenizer.json by its name, or llm.c's."""
    kind = kind_of(read_head(path))
    if path.suffix == ".json" or kind == "json":
        return read_tokenizer_json(path)
    if kind == LLMC_TOKENIZER:
        return read_llmc(path)
    if kind in (LLMC, TORCH, SAFETENSORS):
        raise NoTokenizerError(
            "this is a file of weights, which holds no tokenizer",
            where=str(path),
            remedy="Pass tokenizer= with the folder or gpt2_tokenizer.bin of its tokenizer, or "
            "token ids.",
        )
    if kind == "text":
        raise TokenizerError(
            "this is a text file, not a tokenizer",
            where=str(path),
            remedy="Pass the folder that holds vocab.json and merges.txt, or a tokenizer.json.",
        )
    raise broken("it is neither JSON nor llm.c's", path)


def _read_pair(vocab_path: Path, merges_path: Path) -> Vocabulary:
    lines = read_file(merges_path).decode("utf-8", "surrogateescape").split("\n")
    merges = [
        line.rstrip("\r").split(" ")
        for line in lines
        if line.strip() and not line.startswith("#version")
    ]
    vocab = json_object(vocab_path)
    added = read_added(vocab_path.parent, vocab, vocab_path)
    return _bpe(vocab, merges, added, added.prefix_space, merges_path)


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The `tokenizers` library's file, if its effect is that of GPT-2's BPE."""
    whole = json_object(path)
    vocab, merges, listed = tokenizer_json.parts(whole, path)
    prefix = tokenizer_json.prefix_space(whole, path)
    added = read_added(path.parent, vocab, path, listed)
    return _bpe(vocab, merges, added, added.prefix_space if added.gpt2 else prefix, path)


def _bpe(
    vocab: dict[str, Any], merges: list[Any], added: Added, prefix_space: bool, path: Path
) -> Vocabulary:
    """Check a vocabulary (printable symbols to ids) against merges in order, and join them."""
    if not all(map(is_id, vocab.values())) or len(set(vocab.values())) != len(vocab):
        raise broken("an id of the vocabulary is not a number, or stands twice", path)
    owners = dict(zip(vocab.values(), vocab, strict=True))
    for text, token in added.tokens.items():
        if owners.setdefault(token.id, text) != text or vocab.get(text, token.id) != token.id:
            raise broken(f"the added token {text!r} clashes with the vocabulary", path)
    if lost := [symbol for symbol in BYTE_SYMBOLS if symbol not in vocab]:
        raise other_kind(
            f"the vocabulary has no token for byte {BYTE_SYMBOLS[lost[0]]:#04x}, so that some "
            "texts could not be encoded",
            path,
        )
    rules: list[tuple[int, int, int]] = []
    try:
        rules.extend((vocab[a], vocab[b], vocab[a + b]) for a, b in merges)
    except (KeyError, ValueError, TypeError) as error:
        raise TokenizerError(
            f"merge {len(rules)} does not fit the vocabulary: {merges[len(rules)]!r}"[:200],
            where=str(path),
            remedy="Take vocabulary and merges from the same checkpoint.",
        ) from error
    alphabet = [vocab[symbol] for symbol in BYTE_SYMBOLS]
    texts = token_texts(vocab) | {
        token.id: text.encode("utf-8", "replace") for text, token in added.tokens.items()
    }
    learnt = reachable(sorted(alphabet), rules)
    return Vocabulary(
        sorted(alphabet) + (learnt or []),
        texts,
        added.tokens,
        {role: added.tokens[text].id for role, text in added.roles.items()},
        prefix_space,
        rules if learnt is None else [],
    )


def read_llmc(path: Path) -> Vocabulary:
    """llm.c's gpt2_tokenizer.bin, versions 1 and 2: every token's bytes in the order of ids.

    It holds no merges and needs none: GPT-2's ids are in merge order.
    """
    data = read_file(path)
    if len(data) < _LLMC_HEADER:
        raise broken("it is shorter than llm.c's header", path)
    magic, version, count, end = np.frombuffer(data, "<i4", 4).tolist()
    if magic != LLMC_TOKENIZER_MAGIC or version not in (1, 2):
        raise broken(f"magic {magic} and version {version} are not llm.c's", path)
    # Version 1 did not store the end-of-text token: it was always GPT-2's.
    end = count - 1 if version == 1 else end
    texts: dict[int, bytes] = {}
    place = _LLMC_HEADER
    while len(texts) < count and place < len(data):
        size = data[place]
        if not size:
            raise broken(f"token {len(texts)} is empty", path)
        texts[len(texts)] = data[place + 1 : place + 1 + size]
        place += 1 + size
    if len(texts) != count or place != len(data) or end not in texts:
        raise broken("the number of tokens is not what the header says", path)
    merged = [id_ for id_ in texts if id_ != end]
    ordinary = {texts[id_] for id_ in merged}
    if len(ordinary) != len(merged) or not all(bytes([b]) in ordinary for b in range(256)):
        raise broken("a token stands twice or a byte has none", path)
    name = texts[end].decode("utf-8", "replace")
    roles = {"bos_token": end, "eos_token": end}
    return Vocabulary(merged, texts, {name: AddedToken(name, end)}, roles)
