"""tokenizer.json of the ``tokenizers`` library, judged by its effect on ids.

The same tokenizer is spelled in many ways: steps alone or in a sequence of one,
GPT-2's pattern written out, normalizers and post-processors that do nothing.
What has GPT-2's effect is read, and all else is refused by the part that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .reading import broken, is_id, other_kind

# How files spell the pattern that cuts GPT-2's words.
_WORD = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PATTERNS = {
    rf"'s|'t|'re|'ve|'m|'ll|'d|{_WORD}",
    rf"'(?:[sdmt]|ll|ve|re)|{_WORD}",
    rf"(?:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
}
_MODEL_OPTIONS = ("dropout", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")


def parts(whole: dict[str, Any], path: Path) -> tuple[dict[str, Any], list[Any], list[Any]]:
    """Vocabulary, merges and added tokens."""
    model = whole.get("model")
    if not isinstance(model, dict):
        if whole and all(map(is_id, whole.values())):
            raise TokenizerError(
                "this is a vocabulary alone, not a tokenizer",
                where=str(path),
                remedy="Pass the folder that holds it and its merges.",
            )
        raise broken("there is no model in it", path)
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise other_kind(f"the tokenizer is a {kind}, not a byte-level BPE"[:200], path)
    vocab, merges, listed = model.get("vocab"), model.get("merges"), whole.get("added_tokens", [])
    if not isinstance(vocab, dict) or not isinstance(merges, list) or not isinstance(listed, list):
        raise broken("vocab, merges or added_tokens have the wrong type", path)
    return vocab, [line.split(" ") if isinstance(line, str) else line for line in merges], listed


def prefix_space(whole: dict[str, Any], path: Path) -> bool:
    """Check every step but vocabulary and merges; whether a space goes before the text."""
    model = whole["model"]
    # A text may be cut where it does not begin: there such a space would stand inside.
    cut, prefix = _pre_tokenizer(whole.get("pre_tokenizer"))
    fits = {
        **{name: not model.get(name) for name in _MODEL_OPTIONS},
        "normalizer": not list(_steps(whole.get("normalizer"), "normalizers")),
        "pre_tokenizer": cut,
        "decoder": _decodes_bytes(whole.get("decoder")),
        "post_processor": _adds_no_token(whole.get("post_processor")),
    }
    if wrong := [name for name, fine in fits.items() if not fine]:
        raise other_kind(f"not GPT-2's byte-level BPE: its {wrong[0]} differs", path)
    return prefix


def _kind(part: Any) -> str:
    return part.get("type", "") if isinstance(part, dict) else ""


def _steps(part: Any, name: str) -> Iterator[Any]:
    """The steps of a part that may be missing, one step, or a sequence of sequences."""
    waiting = [part]
    for _ in range(1000):
        if not waiting:
            return
        step = waiting.pop(0)
        if _kind(step) == "Sequence" and isinstance(step.get(name), list):
            waiting = [*step[name], *waiting]
        elif step is not None:
            yield step
    yield from waiting


def _pre_tokenizer(part: Any) -> tuple[bool, bool]:
    """Whether words are cut as GPT-2 does, and whether a space goes before the first."""
    steps = list(_steps(part, "pretokenizers"))
    if not steps or _kind(steps[-1]) != "ByteLevel":
        return False, False
    last, before = steps[-1], steps[:-1]
    prefix, own = last.get("add_prefix_space", True), last.get("use_regex", True)
    if not isinstance(prefix, bool) or not isinstance(own, bool):
        return False, False
    split = all(map(_is_gpt2_split, before))
    return split and (own or bool(before)) and not (prefix and before), prefix


def _is_gpt2_split(step: Any) -> bool:
    if _kind(step) != "Split" or not isinstance(step.get("pattern"), dict):
        return False
    pattern = step["pattern"].get("Regex")
    # The pattern leaves nothing between its matches.
    manner = step.get("behavior"), bool(step.get("invert"))
    whole = manner in (("Isolated", False), ("Isolated", True), ("Removed", True))
    return isinstance(pattern, str) and pattern in _PATTERNS and whole


def _decodes_bytes(part: Any) -> bool:
    kinds = [_kind(step) for step in _steps(part, "decoders")]
    return kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}


def _adds_no_token(part: Any) -> bool:
    """Whether ids stay as they are: transformers 5 writes a template of nothing but the text."""
    for step in _steps(part, "processors"):
        if _kind(step) != "TemplateProcessing":
            if _kind(step) != "ByteLevel":
                return False
            continue
        single = step.get("single")
        whole = isinstance(single, list) and len(single) == 1 and isinstance(single[0], dict)
        if not whole or list(single[0]) != ["Sequence"]:
            return False
    return True
