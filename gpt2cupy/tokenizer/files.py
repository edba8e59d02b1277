"""Reading tokenizers: every file format of GPT-2's byte-level BPE becomes one ``Vocabulary``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TokenizerError
from ..files import open_plain
from .vocabulary import BYTE_SYMBOLS, END_OF_TEXT, Vocabulary, reachable, token_texts

_LLMC_MAGIC, _LLMC_MODEL_MAGIC = 20240328, 20240326
_LLMC_HEADER = 256 * 4
_MAX_BYTES = 64 << 20  # far above any real tokenizer; bounds what a wrong file can cost
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
    raise TokenizerError(
        "the folder has no tokenizer",
        where=str(folder),
        remedy="It needs tokenizer.json, or vocab.json and merges.txt, or encoder.json and "
        "vocab.bpe; or pass tokenizer= with the place of one.",
    )


def _read_pair(vocab_path: Path, merges_path: Path) -> Vocabulary:
    lines = _read(merges_path).decode("utf-8", "surrogateescape").split("\n")
    merges = [
        line.rstrip("\r").split(" ")
        for line in lines
        if line.strip() and not line.startswith("#version")
    ]
    added = _Added(vocab_path.parent)
    return _bpe(_json_object(vocab_path), merges, added, where=str(merges_path))


def read_tokenizer_json(path: Path) -> Vocabulary:
    """The `tokenizers` library's file, if it is GPT-2's kind of BPE and nothing else."""
    whole = _json_object(path)
    model = whole.get("model")
    if not isinstance(model, dict):
        raise _broken("there is no model in it", path)
    splitter = whole.get("pre_tokenizer") or {}
    outer = {
        "model": model.get("type", "BPE") == "BPE",
        "dropout": not model.get("dropout"),
        "byte_fallback": not model.get("byte_fallback"),
        "ignore_merges": not model.get("ignore_merges"),
        "continuing_subword_prefix": not model.get("continuing_subword_prefix"),
        "end_of_word_suffix": not model.get("end_of_word_suffix"),
        "normalizer": whole.get("normalizer") is None,
        "pre_tokenizer": _kind(splitter) == "ByteLevel" and splitter.get("use_regex", True) is True,
        "add_prefix_space": _kind(splitter) == "" or splitter.get("add_prefix_space") is False,
        "decoder": _kind(whole.get("decoder")) == "ByteLevel",
        "post_processor": _adds_no_token(whole.get("post_processor")),
    }
    if wrong := [name for name, fits in outer.items() if not fits]:
        raise TokenizerError(
            f"not GPT-2's byte-level BPE: its {wrong[0]} differs",
            where=str(path),
            remedy="Only the tokenizers of GPT-2 checkpoints are read.",
        )
    vocab, merges, listed = model.get("vocab"), model.get("merges"), whole.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(listed, list):
        raise _broken("vocab, merges or added_tokens have the wrong type", path)
    pairs = [line.split(" ") if isinstance(line, str) else line for line in merges]
    added = _Added(path.parent)
    for entry in listed:
        added.note(entry, entry.get("id") if isinstance(entry, dict) else None, path)
    return _bpe(vocab, pairs, added, where=str(path))


def _kind(part: Any) -> str:
    return part.get("type", "") if isinstance(part, dict) else ""


def _adds_no_token(post_processor: Any) -> bool:
    """Whether ids stay as they are: transformers 5 writes a template of nothing but the text."""
    if _kind(post_processor) != "TemplateProcessing":
        return _kind(post_processor) in ("", "ByteLevel")
    parts = post_processor.get("single")
    whole = isinstance(parts, list) and len(parts) == 1 and isinstance(parts[0], dict)
    return whole and list(parts[0]) == ["Sequence"]


class _Added:
    """Added tokens and options that stand beside the vocabulary in a checkpoint folder."""

    def __init__(self, folder: Path) -> None:
        self.ids: dict[str, int] = {}
        self.always: set[str] = set()
        self.end = END_OF_TEXT
        path = folder / "tokenizer_config.json"
        options = _json_object(path) if is_file(path) else {}
        for name in ("add_prefix_space", "add_bos_token"):
            if options.get(name):
                raise TokenizerError(
                    f"{name} is not supported",
                    where=str(path),
                    remedy="Set it to false and write the space or token into the prompt.",
                )
        decoder = options.get("added_tokens_decoder") or {}
        for id_, entry in decoder.items() if isinstance(decoder, dict) else ():
            self.note(entry, int(id_) if id_.isdecimal() and len(id_) < 12 else None, path)
        beside = folder / "added_tokens.json"
        for token, id_ in (_json_object(beside) if is_file(beside) else {}).items():
            self.note({"content": token, "special": token not in self.always}, id_, beside)
        end = options.get("eos_token")
        end = end.get("content") if isinstance(end, dict) else end
        if isinstance(end, str) and end:
            self.end = end

    def note(self, entry: Any, id_: Any, path: Path) -> None:
        content = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(content, str) or not content or not _is_id(id_):
            raise _broken("an added token has no text or no id", path)
        if any(entry.get(flag) for flag in ("lstrip", "rstrip", "single_word")):
            raise TokenizerError(
                f"the added token {content!r} takes lstrip, rstrip or single_word",
                where=str(path),
                remedy="Only plain added tokens are supported; set the three to false.",
            )
        self.ids[content] = id_
        if entry.get("special", True):
            self.always.discard(content)
        else:
            self.always.add(content)


def _bpe(
    vocab: dict[str, Any], merges: list[list[str]], added: _Added, *, where: str
) -> Vocabulary:
    """Check a vocabulary (printable symbols to ids) against merges in order, and join them."""
    if not all(map(_is_id, vocab.values())) or len(set(vocab.values())) != len(vocab):
        raise _broken("an id of the vocabulary is not a number, or stands twice", Path(where))
    for name in (END_OF_TEXT, added.end):
        if name in vocab:
            added.ids.setdefault(name, vocab[name])
    owners = dict(zip(vocab.values(), vocab, strict=True))
    for text, id_ in added.ids.items():
        if owners.setdefault(id_, text) != text or vocab.get(text, id_) != id_:
            raise _broken(f"the added token {text!r} clashes with the vocabulary", Path(where))
    if lost := [symbol for symbol in BYTE_SYMBOLS if symbol not in vocab]:
        raise TokenizerError(
            f"the vocabulary has no token for byte {BYTE_SYMBOLS[lost[0]]:#04x}",
            where=where,
            remedy="Byte-level BPE needs all 256; some texts could not be encoded.",
        )
    rules: list[tuple[int, int, int]] = []
    try:
        rules.extend((vocab[a], vocab[b], vocab[a + b]) for a, b in merges)
    except (KeyError, ValueError, TypeError) as error:
        raise TokenizerError(
            f"merge {len(rules)} does not fit the vocabulary: {merges[len(rules)]!r}"[:200],
            where=where,
            remedy="Take vocabulary and merges from the same checkpoint.",
        ) from error
    alphabet = sorted(vocab[symbol] for symbol in BYTE_SYMBOLS)
    texts = token_texts(vocab) | {
        id_: text.encode("utf-8", "replace") for text, id_ in added.ids.items()
    }
    merged = alphabet + reachable(alphabet, rules, where)
    return Vocabulary(merged, texts, added.ids, frozenset(added.always), added.end)


def read_llmc(path: Path) -> Vocabulary:
    """llm.c's gpt2_tokenizer.bin, versions 1 and 2: every token's bytes in the order of ids.

    It holds no merges and needs none: GPT-2's ids are in merge order.
    """
    data = _read(path)
    if len(data) < _LLMC_HEADER:
        raise _broken("it is shorter than llm.c's header", path)
    magic, version, count, end = np.frombuffer(data, "<i4", 4).tolist()
    if magic == _LLMC_MODEL_MAGIC:
        raise TokenizerError(
            "this is a model of llm.c, not a tokenizer",
            where=str(path),
            remedy="Pass tokenizer= with the gpt2_tokenizer.bin that belongs to it.",
        )
    if magic != _LLMC_MAGIC or version not in (1, 2):
        raise _broken(f"magic {magic} and version {version} are not llm.c's", path)
    # Version 1 did not store the end-of-text token: it was always GPT-2's.
    end = count - 1 if version == 1 else end
    texts: dict[int, bytes] = {}
    place = _LLMC_HEADER
    while len(texts) < count and place < len(data):
        size = data[place]
        if not size:
            raise _broken(f"token {len(texts)} is empty", path)
        texts[len(texts)] = data[place + 1 : place + 1 + size]
        place += 1 + size
    if len(texts) != count or place != len(data) or end not in texts:
        raise _broken("the number of tokens is not what the header says", path)
    merged = [id_ for id_ in texts if id_ != end]
    ordinary = {texts[id_] for id_ in merged}
    if len(ordinary) != len(merged) or not all(bytes([b]) in ordinary for b in range(256)):
        raise _broken("a token stands twice or a byte has none", path)
    name = texts[end].decode("utf-8", "replace")
    return Vocabulary(merged, texts, {name: end}, end=name)


def is_file(path: Path) -> bool:
    """Whether there is such a file; a folder that may not be searched is an error."""
    try:
        return path.is_file()
    except OSError as error:
        raise _unreadable(path, error) from error


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _read(path: Path) -> bytes:
    try:
        with open_plain(path) as file:
            if os.fstat(file.fileno()).st_size > _MAX_BYTES:
                raise _broken(f"it is larger than {_MAX_BYTES >> 20} MiB", path)
            return file.read()
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> TokenizerError:
    return TokenizerError(
        f"cannot read the tokenizer: {error.strerror}",
        where=str(path),
        remedy="Check that the file exists and may be read.",
    )


def _json_object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise _broken(f"not JSON: {error}", path) from error
    if not isinstance(found, dict):
        raise _broken("it is not a JSON object", path)
    return found


def _broken(what: str, path: Path) -> TokenizerError:
    return TokenizerError(
        f"the tokenizer file is broken: {what}",
        where=str(path),
        remedy="Download or copy it again.",
    )
