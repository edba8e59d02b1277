"""Tokens beside the vocabulary, and which of them begin, end and pad: as transformers 5 reads them.

They come from tokenizer.json, ``added_tokens_decoder`` of tokenizer_config.json,
added_tokens.json, and the names (bos_token, eos_token, ...) of tokenizer_config.json
and special_tokens_map.json. The last is read only where there is no
``added_tokens_decoder``; version 4 of transformers reads it always. A named
token without an id gets the next one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import NoTokenizerError
from .reading import broken, is_file, is_id, json_object, other_kind
from .vocabulary import END_OF_TEXT, AddedToken

ROLES = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)
_GPT2_ROLES = ROLES[:3]  # what GPT2Tokenizer calls <|endoftext|> where nothing is said
_GPT2_CLASSES = (None, "GPT2Tokenizer", "GPT2TokenizerFast")
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
# Options of tokenizer_config.json that are followed here, or do not change ids.
_KNOWN = {
    *ROLES,
    *("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens"),
    *("add_prefix_space", "add_bos_token", "add_eos_token", "auto_map", "tokenizer_class"),
    *("clean_up_tokenization_spaces", "errors", "trim_offsets", "split_special_tokens"),
    *("model_max_length", "max_len", "max_length", "model_input_names", "stride"),
    *("padding", "padding_side", "pad_to_multiple_of", "pad_token_id", "pad_token_type_id"),
    *("truncation", "truncation_side", "truncation_strategy", "return_token_type_ids"),
    *("bos_token_id", "eos_token_id", "unk_token_id", "chat_template", "response_schema"),
    *("name_or_path", "special_tokens_map_file", "tokenizer_file", "vocab_file", "merges_file"),
    *("full_tokenizer_file", "slow_tokenizer_class", "use_fast", "from_slow", "tokenizer_type"),
    *("processor_class", "transformers_version", "backend", "is_local", "local_files_only"),
    *("init_inputs", "model_specific_special_tokens", "verbose", "do_lower_case", "legacy"),
    *("max_model_input_sizes", "use_auth_token", "revision", "cache_dir", "unk_id", "_commit_hash"),
}


@dataclass
class Added:
    """What the files beside a vocabulary say.

    Attributes
    ----------
    tokens : dict of str to AddedToken
    roles : dict of str to str
        Text of bos_token, eos_token and so on, where they are named.
    gpt2 : bool
        transformers reads the folder as GPT2Tokenizer: then the options of
        tokenizer_config.json go before those of tokenizer.json.
    prefix_space : bool
        The option add_prefix_space.
    """

    tokens: dict[str, AddedToken] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)
    gpt2: bool = True
    prefix_space: bool = False


def read_added(
    folder: Path, vocab: Mapping[str, Any], place: Path, listed: list[Any] | None = None
) -> Added:
    """Gather added and named tokens of a folder.

    Parameters
    ----------
    folder : Path
    vocab : mapping of str to int
        The vocabulary, which named tokens may be part of.
    place : Path
        tokenizer.json, or the vocabulary where there is none.
    listed : list, optional
        ``added_tokens`` of tokenizer.json; None where there is none.
    """
    path = folder / "tokenizer_config.json"
    options = json_object(path) if is_file(path) else {}
    _check(options, path, whole=listed is not None)
    found = Added(gpt2=options.get("tokenizer_class") in _GPT2_CLASSES)
    found.prefix_space = bool(options.get("add_prefix_space"))
    for entry in listed or ():
        _note(found, entry, entry.get("id") if isinstance(entry, dict) else None, place)
    if "added_tokens_decoder" in options:
        decoder = options["added_tokens_decoder"] or {}
        if not isinstance(decoder, dict):
            raise broken("added_tokens_decoder is no object", path)
        for id_, entry in decoder.items():
            _note(found, entry, int(id_) if id_.isdecimal() and len(id_) < 12 else None, path)
    else:
        map_path, added_path = folder / "special_tokens_map.json", folder / "added_tokens.json"
        options = options | (json_object(map_path) if is_file(map_path) else {})
        for token, id_ in (json_object(added_path) if is_file(added_path) else {}).items():
            known = found.tokens.get(token)
            special = known.special if known else token in [text for _, text, _ in _names(options)]
            entry = {"content": token, "special": special, "normalized": not special}
            _note(found, entry, id_, added_path)
    defaults = dict.fromkeys(_GPT2_ROLES, END_OF_TEXT) if found.gpt2 else {}
    for role, text, entry in _names(defaults | options):
        if role in ROLES:
            found.roles[role] = text
        _name(found, text, entry, vocab)
    return found


def _check(options: Mapping[str, Any], path: Path, *, whole: bool) -> None:
    """Refuse what would change ids and is not followed; name what is not known."""
    auto = options.get("auto_map")
    if isinstance(auto, list | tuple) or (isinstance(auto, dict) and auto.get("AutoTokenizer")):
        raise other_kind("the tokenizer is a program of its own (auto_map)", path)
    for name in ("add_bos_token", "add_eos_token"):
        # With a tokenizer.json transformers asks its post-processor alone.
        if options.get(name) and not whole:
            raise NoTokenizerError(
                f"{name} is not supported",
                where=str(path),
                remedy="Set it to false and write the token into the prompt.",
            )
    unknown = [
        name for name in options if name not in _KNOWN and not _is_token(name, options[name])
    ]
    if unknown:
        warnings.warn(
            f"unknown options of the tokenizer are left out: {', '.join(sorted(unknown))[:300]} "
            f"({path})",
            RuntimeWarning,
            stacklevel=6,
        )


def _content(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _is_token(name: str, value: Any) -> bool:
    return name.endswith("_token") and (value is None or _content(value) is not None)


def _names(options: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(role, text, flags) of every named token in the order in which transformers adds them."""
    extra = options.get("extra_special_tokens") or options.get("additional_special_tokens") or []
    own = [name for name in options if name not in ROLES and _is_token(name, options[name])]
    values = [(name, options.get(name)) for name in (*ROLES, *own)]
    if isinstance(extra, dict):
        values += extra.items()
    elif isinstance(extra, list):
        values += [("", value) for value in extra]
    for role, value in values:
        text = _content(value)
        if text is not None:
            yield role, text, value if isinstance(value, dict) else {}


def _name(found: Added, text: str, entry: dict[str, Any], vocab: Mapping[str, Any]) -> None:
    """A named token is special; one without an id gets the vocabulary's, or the next."""
    known = found.tokens.get(text)
    if known is not None:
        found.tokens[text] = _made(text, known.id, vars(known) | {"special": True})
        return
    id_ = vocab.get(text)
    if id_ is None:
        taken = [token.id for token in found.tokens.values()]
        id_ = max([len(vocab), *(other + 1 for other in taken if other >= len(vocab))])
        if id_ in vocab.values():
            id_ = max(*filter(is_id, vocab.values()), *taken) + 1
    flags = {"normalized": False} | {flag: entry[flag] for flag in _FLAGS if flag in entry}
    found.tokens[text] = _made(text, id_, flags | {"special": True})


def _note(found: Added, entry: Any, id_: Any, path: Path) -> None:
    content = entry.get("content") if isinstance(entry, dict) else None
    if not isinstance(content, str) or not content or not is_id(id_):
        raise broken("an added token has no text or no id", path)
    found.tokens[content] = _made(content, id_, entry)


def _made(text: str, id_: int, entry: Mapping[str, Any]) -> AddedToken:
    special = bool(entry.get("special", True))
    flags = {flag: bool(entry.get(flag)) for flag in ("lstrip", "rstrip", "single_word")}
    normalized = bool(entry.get("normalized", not special))
    return AddedToken(text, id_, special=special, normalized=normalized, **flags)
