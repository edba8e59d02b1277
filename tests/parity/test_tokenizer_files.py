"""Folders of tokenizers as people have them: the ids are those of transformers' AutoTokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import TINY, small_bpe, tokenizer_json, write_bpe
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT, Tokenizer

transformers = pytest.importorskip("transformers")
VOCAB, MERGES = small_bpe()
NEXT = len(VOCAB)
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


def token(content: str, **flags: bool) -> dict:
    return {"content": content, "__type": "AddedToken"} | PLAIN | flags


def listed(content: str, id_: int, **flags: bool) -> dict:
    return {"content": content, "id": id_, "special": True} | PLAIN | flags


def whole(**changes) -> dict:
    return tokenizer_json(
        VOCAB, MERGES, **({"added_tokens": [listed(END_OF_TEXT, VOCAB[END_OF_TEXT])]} | changes)
    )


def both(folder: Path, files: dict, json_: dict | None = None, vocab: dict = VOCAB):
    """Ours and theirs for one folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(TINY.to_dict()))
    if json_ is None:
        write_bpe(folder, vocab, MERGES)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(json_))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return Tokenizer.from_path(folder), transformers.AutoTokenizer.from_pretrained(folder)


def agree(ours, theirs, text: str) -> None:
    ids = theirs(text)["input_ids"]
    assert ours.encode(text, allowed_special="all") == ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    plain = theirs(text, split_special_tokens=True)["input_ids"]
    if all(theirs.added_tokens_decoder[id_].special for id_ in theirs.added_tokens_decoder):
        assert ours.encode(text) == plain


NAMES = [
    {},
    {CONFIG: {"pad_token": "<pad>"}},
    {CONFIG: {"pad_token": "he", "eos_token": "</s>"}},
    {CONFIG: {"bos_token": None, "eos_token": "</s>"}},
    {CONFIG: {role: f"<{role}>" for role in ROLES}},
    {CONFIG: {"pad_token": token("<pad>"), "mask_token": token("<m>", lstrip=True)}},
    {CONFIG: {"additional_special_tokens": ["<x>", "<y>"], "pad_token": "<pad>"}},
    {CONFIG: {"extra_special_tokens": ["<x>", "<y>"], "pad_token": "<pad>"}},
    {CONFIG: {"extra_special_tokens": {"image_token": "<x>"}, "pad_token": "<pad>"}},
    {CONFIG: {"image_token": "<x>", "pad_token": "<pad>"}},
    {MAP: {"pad_token": "<pad>", "bos_token": "<s>", "additional_special_tokens": ["<x>"]}},
    {MAP: {"pad_token": token("<pad>", rstrip=True)}},
    {MAP: {"pad_token": "<pad>"}, CONFIG: {"pad_token": "<other>", "bos_token": "<s>"}},
    {
        MAP: {"pad_token": "<pad>"},
        CONFIG: {"added_tokens_decoder": {str(NEXT): token("<x>", special=True)}},
    },
    {MAP: {"pad_token": "<pad>"}, ADDED: {"<pad>": NEXT, "word": NEXT + 1}},
    {ADDED: {"<x>": NEXT}, CONFIG: {"additional_special_tokens": ["<x>"]}},
]
TEXT = "a <pad>  word<x> <m> </s><s>the <|endoftext|> the"


@pytest.mark.parametrize("files", NAMES, ids=str)
@pytest.mark.parametrize("form", ["pair", "json", "fast"])
def test_named_tokens(tmp_path, files, form):
    files = {name: dict(content) for name, content in files.items()}
    if form == "fast":
        files[CONFIG] = files.get(CONFIG, {}) | FAST
    ours, theirs = both(tmp_path, files, None if form == "pair" else whole())
    for role in ROLES:
        assert ours.special_tokens.get(role) == getattr(theirs, f"{role}_id"), role
    assert ours.vocab_size == len(theirs)
    assert ours.specials == {t.content: i for i, t in theirs.added_tokens_decoder.items()}
    agree(ours, theirs, TEXT)


def test_a_vocabulary_without_the_end_of_text(tmp_path):
    vocab = {text: id_ for text, id_ in VOCAB.items() if text != END_OF_TEXT}
    ours, theirs = both(tmp_path, {CONFIG: {"pad_token": "<pad>"}}, vocab=vocab)
    assert ours.eot_token == theirs.eos_token_id == len(vocab)
    assert ours.special_tokens["pad_token"] == theirs.pad_token_id
    agree(ours, theirs, TEXT)


@pytest.mark.parametrize(
    ("files", "json_"),
    [
        ({CONFIG: {"add_prefix_space": True}}, None),
        ({CONFIG: {"add_prefix_space": True}}, whole()),
        ({}, whole(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True,
                                  "trim_offsets": True})),
        ({CONFIG: FAST}, whole(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True,
                                              "trim_offsets": True})),
        ({CONFIG: {"add_bos_token": True, "add_eos_token": True}}, whole()),
        ({CONFIG: {"clean_up_tokenization_spaces": True, "errors": "replace"}}, None),
    ],
    ids=["pair", "json", "in the file", "in the file, fast", "bos", "clean up"],
)  # fmt: skip
def test_options(tmp_path, files, json_):
    ours, theirs = both(tmp_path, files, json_)
    for text in ("", "the", " the", "the<|endoftext|>the  <|endoftext|>", "\nthe", "a , b ."):
        agree(ours, theirs, text)


SPLIT = {
    "type": "Split",
    "pattern": {
        "Regex": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    },
    "behavior": "Isolated",
    "invert": False,
}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
RAW = BYTES | {"use_regex": False}


def sequence(name: str, *steps: dict) -> dict:
    return {"type": "Sequence", name: list(steps)}


SPELLINGS = [
    {"pre_tokenizer": sequence("pretokenizers", BYTES)},
    {"pre_tokenizer": sequence("pretokenizers", SPLIT, RAW)},
    {"pre_tokenizer": sequence("pretokenizers", SPLIT | {"invert": True}, RAW)},
    {"pre_tokenizer": sequence("pretokenizers", SPLIT | {"behavior": "Removed", "invert": True},
                               RAW)},
    {"pre_tokenizer": sequence("pretokenizers", SPLIT, BYTES)},
    {"normalizer": sequence("normalizers")},
    {"decoder": sequence("decoders", BYTES, {"type": "Fuse"})},
    {"byte_fallback": True},
    {"fuse_unk": True, "unk_token": "<|endoftext|>"},
]  # fmt: skip
letters = st.text(st.sampled_from("the aé1!'s \n\t\u3000\x1c"), max_size=40)


@pytest.mark.parametrize("changes", SPELLINGS, ids=str)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=letters)
def test_spellings(tmp_path, changes, text):
    folder = tmp_path / "folder"
    if not folder.exists():
        both(folder, {CONFIG: FAST}, whole(**changes))
    backend = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    assert Tokenizer.from_path(folder).encode(text) == backend.encode(text).ids


@pytest.fixture(scope="module")
def flagged(tmp_path_factory):
    tokens = {
        "bos_token": token("<l>", lstrip=True),
        "pad_token": token("<r>", rstrip=True),
        "mask_token": token("<b>", lstrip=True, rstrip=True),
        "cls_token": token("<n>", normalized=True),
    }
    files = {CONFIG: tokens | {"add_prefix_space": True}, ADDED: {"ab": NEXT, "b<": NEXT + 1}}
    return both(tmp_path_factory.mktemp("flags"), files)


@settings(max_examples=400)
@given(
    st.lists(
        st.sampled_from(["<l>", "<r>", "<b>", "<n>", " ", "\u3000", "\x1c", "a", "b", "<", "ab"])
    ).map("".join)
)
def test_white_space_beside_tokens(flagged, text):
    agree(*flagged, text)


@pytest.mark.parametrize("seed", range(20))
def test_merges_out_of_order(tmp_path, seed):
    """Merges in any order, some twice: the rule of the tokenizers library."""
    import random

    rng = random.Random(seed)
    merges = [(a, b) for a in "abc" for b in "abc"]
    merges += [(a + b, c) for a in "abc" for b in "abc" for c in "abc"]
    merges += [(a + b, c + d) for a in "ab" for b in "ab" for c in "ab" for d in "ab"]
    rng.shuffle(merges)
    merges = merges[: rng.randint(5, 40)]
    merges += [(x[:1], x[1:]) for pair in merges for x in pair if len(x) == 2]
    rng.shuffle(merges)
    tokens = [*BYTE_SYMBOLS, *dict.fromkeys(a + b for a, b in merges), END_OF_TEXT]
    write_bpe(tmp_path, {text: id_ for id_, text in enumerate(tokens)}, merges)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    ours = Tokenizer.from_path(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for _ in range(100):
        text = "".join(rng.choices("abc ", k=rng.randint(1, 30)))
        assert ours.encode(text) == theirs(text)["input_ids"], (merges, text)


def test_a_merge_of_gpt2_that_stands_twice(gpt2_folder, tmp_path):
    vocab = json.loads((gpt2_folder / "vocab.json").read_text())
    lines = (gpt2_folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split(" ")) for line in [*lines[1:], lines[5], lines[1]]]
    write_bpe(tmp_path, vocab, merges)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_dict()))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "The theory that they were there, then another; in the end, 42 of them."
    assert Tokenizer.from_path(tmp_path).encode(text) == theirs(text)["input_ids"]
