"""tokenizer.json by its effect: other spellings of GPT-2's BPE, and tokenizers of other kinds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from builders import TINY, small_bpe, tokenizer_json, write_bpe, write_checkpoint
from command import call

import gpt2cupy
from gpt2cupy.errors import InputError, NoTokenizerError, TokenizerError
from gpt2cupy.tokenizer import NoTokenizer, Tokenizer

VOCAB, MERGES = small_bpe()
TEXT = " the the  theta aaaa aaaaa é I've 12 we'll\n\n x"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
RAW = BYTES | {"use_regex": False}
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SHORT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def split(pattern: str = PATTERN, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": behavior,
        "invert": invert,
    }


def steps(name: str, *each: dict) -> dict:
    return {"type": "Sequence", name: list(each)}


def template(*single: dict) -> dict:
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}}


TEXT_ALONE = {"Sequence": {"id": "A", "type_id": 0}}
BOS = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
SAME = [
    {"pre_tokenizer": steps("pretokenizers", BYTES)},
    {"pre_tokenizer": steps("pretokenizers", steps("pretokenizers", BYTES))},
    {"pre_tokenizer": steps("pretokenizers", split(), RAW)},
    {"pre_tokenizer": steps("pretokenizers", split(SHORT), RAW)},
    {"pre_tokenizer": steps("pretokenizers", split(invert=True), RAW)},
    {"pre_tokenizer": steps("pretokenizers", split(behavior="Removed", invert=True), RAW)},
    {"pre_tokenizer": steps("pretokenizers", split(), BYTES)},
    {"normalizer": steps("normalizers")},
    {"normalizer": steps("normalizers", steps("normalizers"))},
    {"decoder": steps("decoders", {"type": "ByteLevel"}, {"type": "Fuse"})},
    {"post_processor": None},
    {"post_processor": template(TEXT_ALONE)},
    {"post_processor": steps("processors", {"type": "ByteLevel"}, template(TEXT_ALONE))},
    {"post_processor": steps("processors")},
    {"byte_fallback": True},
    {"fuse_unk": True},
    {"dropout": 0.0},
    {"continuing_subword_prefix": ""},
]
OTHER = {
    "normalizer": [
        {"type": "NFC"},
        steps("normalizers", {"type": "Lowercase"}),
        {"type": "Prepend", "prepend": " "},
    ],
    "pre_tokenizer": [
        steps("pretokenizers"),
        steps("pretokenizers", {"type": "Digits", "individual_digits": True}, BYTES),
        steps("pretokenizers", split(r"\p{N}"), RAW),
        steps("pretokenizers", split(behavior="Removed"), RAW),
        steps("pretokenizers", split(), RAW | {"add_prefix_space": True}),
        steps("pretokenizers", RAW),
        steps("pretokenizers", BYTES, split()),
        {"type": "Metaspace"},
        {"type": "BertPreTokenizer"},
    ],
    "post_processor": [
        template(BOS, TEXT_ALONE),
        template(TEXT_ALONE, BOS),
        steps("processors", template(TEXT_ALONE), template(BOS, TEXT_ALONE)),
        {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 0]},
    ],
    "decoder": [{"type": "WordPiece"}, steps("decoders", {"type": "Metaspace"})],
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[int]:
    folder = tmp_path_factory.mktemp("plain")
    write_bpe(folder, VOCAB, MERGES)
    return Tokenizer.from_path(folder).encode(TEXT)


@pytest.mark.parametrize("changes", SAME, ids=str)
def test_other_spellings_give_the_same_ids(tmp_path, plain, changes):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(VOCAB, MERGES, **changes)))
    tokenizer = Tokenizer.from_path(tmp_path)
    assert tokenizer.encode(TEXT) == plain
    assert tokenizer.decode(plain) == TEXT


@pytest.mark.parametrize(
    ("name", "part"), [(name, part) for name in OTHER for part in OTHER[name]], ids=str
)
def test_what_has_another_effect_is_named(tmp_path, name, part):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(VOCAB, MERGES, **{name: part})))
    with pytest.raises(NoTokenizerError, match=f"its {name} differs"):
        Tokenizer.from_path(tmp_path)


def test_steps_nested_without_end(tmp_path):
    nested = BYTES
    for _ in range(400):
        nested = steps("pretokenizers", nested)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(VOCAB, MERGES, pre_tokenizer=nested)))
    assert Tokenizer.from_path(tmp_path).encode(" the") == [VOCAB["Ġthe"]]


# -- a model whose tokenizer cannot be read ------------------------------------------------------


def other_tokenizers(folder: Path) -> dict[str, str]:
    """Folders of models, by what is wrong with their tokenizers."""
    says = {
        "none": "the folder has no tokenizer",
        "wordpiece": "WordPiece",
        "wordpiece json": "is a WordPiece, not",
        "sentencepiece": "sentencepiece",
        "bytes": "no token for byte 0xff",
        "merges": "no merges.txt",
        "lowercase": "its normalizer differs",
    }
    for name in says:
        write_checkpoint(folder / name, TINY)
    (folder / "wordpiece" / "vocab.txt").write_text("[PAD]\n[UNK]\nhello\n")
    wordpiece = tokenizer_json(VOCAB, MERGES, type="WordPiece")
    (folder / "wordpiece json" / "tokenizer.json").write_text(json.dumps(wordpiece))
    (folder / "sentencepiece" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    write_bpe(folder / "bytes", {t: i for t, i in VOCAB.items() if t != "ÿ"}, MERGES)
    (folder / "merges" / "vocab.json").write_text(json.dumps(VOCAB))
    lower = tokenizer_json(VOCAB, MERGES, normalizer={"type": "Lowercase"})
    (folder / "lowercase" / "tokenizer.json").write_text(json.dumps(lower))
    return says


def test_a_model_of_ids(tmp_path):
    for name, says in other_tokenizers(tmp_path).items():
        with gpt2cupy.load(tmp_path / name, device="cpu") as lm:
            found = lm.generate([3, 5], max_new_tokens=4)
            assert len(found.tokens) == 4 and found.text == ""
            assert [piece.token for piece in lm.stream([3, 5], max_new_tokens=4)] == found.tokens
            assert lm.score([3, 5, 7], bos=False).tokens == [5, 7]
            assert lm([[1, 2]]).shape == (1, 2, TINY.vocab_size)
            calls = [
                lambda lm=lm: lm.generate("text"),
                lambda lm=lm: lm.generate(["text", "more"]),
                lambda lm=lm: lm.generate([3], stop=("x",), max_new_tokens=3),
                lambda lm=lm: next(lm.stream("text")),
                lambda lm=lm: lm.score("text", bos=False),
                lambda lm=lm: lm.encode("text"),
                lambda lm=lm: lm.tokenizer.decode([1]),
                lambda lm=lm: lm.tokenizer.eot_token,
            ]
            for call_ in calls:
                with pytest.raises(NoTokenizerError, match=says) as caught:
                    call_()
                assert str(tmp_path) in caught.value.where and caught.value.remedy


def test_no_tokenizer_is_an_error_where_text_is_given_to_the_command(tmp_path):
    other_tokenizers(tmp_path)
    model = ("--model", str(tmp_path / "wordpiece"))
    for command in ("generate", "score"):
        code, _, err = call(command, "text", *model, "--device", "cpu")
        assert code == 1 and "WordPiece" in err and "vocab.txt" in err
    code, _, err = call("tokenize", "text", *model)
    assert code == 1 and "WordPiece" in err


def test_a_tokenizer_that_was_asked_for_must_be_read(tmp_path):
    other_tokenizers(tmp_path)
    with pytest.raises(NoTokenizerError, match="WordPiece"):
        gpt2cupy.load(tmp_path / "none", tokenizer=str(tmp_path / "wordpiece"), device="cpu")


def test_a_damaged_tokenizer_is_an_error_at_once(tmp_path):
    write_checkpoint(tmp_path, TINY)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not JSON") as caught:
        gpt2cupy.load(tmp_path, device="cpu")
    assert not isinstance(caught.value, NoTokenizerError)


def test_no_tokenizer_has_the_interface_of_one():
    nothing = NoTokenizer(NoTokenizerError("why", where="here", remedy="That."))
    for name, value in vars(Tokenizer).items():
        if not name.startswith("_") and not isinstance(value, classmethod):
            assert name in vars(NoTokenizer) or name in ("decode",), name
    assert (nothing.specials, nothing.special_tokens, nothing.vocab_size) == ({}, {}, 0)


# -- more tokens than the model ------------------------------------------------------------------


def test_a_padding_token_that_the_model_does_not_have(tmp_path):
    config = gpt2cupy.GPT2Config(
        vocab_size=len(VOCAB), n_positions=16, n_embd=8, n_layer=1, n_head=1
    )
    write_checkpoint(tmp_path, config)
    write_bpe(tmp_path, VOCAB, MERGES)
    (tmp_path / "tokenizer_config.json").write_text('{"pad_token": "[PAD]"}')
    with gpt2cupy.load(tmp_path, device="cpu") as lm:
        pad = lm.tokenizer.special_tokens["pad_token"]
        assert pad == len(VOCAB) == lm.config.vocab_size
        assert len(lm.generate(" the [PAD]", max_new_tokens=3).tokens) <= 3
        with pytest.raises(InputError, match=f"token id {pad} is outside"):
            lm.generate([pad], max_new_tokens=3)
        ids = lm.tokenizer.encode("a[PAD]", allowed_special="all")
        with pytest.raises(InputError, match=f"token id {pad} is outside"):
            lm.score(ids)
        assert np.isfinite(lm.score(" the").logprobs).all()


def test_ordinary_tokens_that_the_model_does_not_have_are_another_model(tmp_path):
    write_checkpoint(tmp_path, TINY)
    write_bpe(tmp_path, VOCAB, MERGES)
    with pytest.raises(InputError, match="262 tokens, the model 211"):
        gpt2cupy.load(tmp_path, device="cpu")
