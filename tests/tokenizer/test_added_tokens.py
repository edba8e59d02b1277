"""Special tokens and options of tokenizers, as people's files have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from builders import small_bpe, tokenizer_json, write_bpe

from gpt2cupy.errors import InputError, NoTokenizerError, TokenizerError
from gpt2cupy.tokenizer import END_OF_TEXT, Tokenizer

VOCAB, MERGES = small_bpe()
END, NEXT = VOCAB[END_OF_TEXT], len(VOCAB)
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}


def read(folder: Path, files: dict[str, object], whole: dict | None = None) -> Tokenizer:
    if whole is None:
        write_bpe(folder, VOCAB, MERGES)
    else:
        (folder / "tokenizer.json").write_text(json.dumps(whole))
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return Tokenizer.from_path(folder)


def token(content: str, **flags: bool) -> dict:
    return {"content": content, "__type": "AddedToken"} | flags


CONFIG, MAP = "tokenizer_config.json", "special_tokens_map.json"
PLAIN = {"bos_token": END, "eos_token": END, "unk_token": END}


@pytest.mark.parametrize(
    ("files", "roles"),
    [
        ({}, {}),
        ({CONFIG: {"pad_token": "<pad>"}}, {"pad_token": NEXT}),
        ({CONFIG: {"pad_token": token("<pad>")}}, {"pad_token": NEXT}),
        ({CONFIG: {"pad_token": {"content": "<pad>"}}}, {"pad_token": NEXT}),
        ({CONFIG: {"pad_token": "the"}}, {"pad_token": NEXT}),
        ({CONFIG: {"pad_token": "he"}}, {"pad_token": VOCAB["he"]}),
        ({CONFIG: {"pad_token": END_OF_TEXT}}, {"pad_token": END}),
        ({CONFIG: {"bos_token": None}}, {"bos_token": None}),
        (
            {CONFIG: {"pad_token": "<p>", "bos_token": "<s>", "eos_token": "</s>"}},
            {"bos_token": NEXT, "eos_token": NEXT + 1, "pad_token": NEXT + 2},
        ),
        (
            {CONFIG: {"additional_special_tokens": ["<x>", token("<y>")], "pad_token": "<p>"}},
            {"pad_token": NEXT},
        ),
        ({CONFIG: {"extra_special_tokens": {"image_token": "<i>"}}}, {}),
        ({CONFIG: {"image_token": "<i>", "pad_token": "<p>"}}, {"pad_token": NEXT}),
        (
            {MAP: {"pad_token": "<p>", "bos_token": "<s>"}},
            {"bos_token": NEXT, "pad_token": NEXT + 1},
        ),
        ({MAP: {"pad_token": token("<p>", lstrip=True)}}, {"pad_token": NEXT}),
        ({MAP: {"pad_token": "<p>"}, CONFIG: {"pad_token": "<other>"}}, {"pad_token": NEXT}),
        (
            {
                MAP: {"pad_token": "<p>"},
                CONFIG: {"added_tokens_decoder": {str(NEXT): {"content": "<x>"}}},
            },
            {},
        ),
        (
            {MAP: {"pad_token": "<p>"}, "added_tokens.json": {"<q>": NEXT, "<p>": NEXT + 1}},
            {"pad_token": NEXT + 1},
        ),
        (
            {CONFIG: {"added_tokens_decoder": {"400": {"content": "<x>"}}, "pad_token": "<p>"}},
            {"pad_token": 401},
        ),
    ],
    ids=str,
)
def test_ids_of_named_tokens(tmp_path, files, roles):
    found = read(tmp_path, files).special_tokens
    assert found == {role: id_ for role, id_ in (PLAIN | roles).items() if id_ is not None}


def test_every_named_token_is_special(tmp_path):
    tokenizer = read(tmp_path, {CONFIG: {"additional_special_tokens": ["<x>"], "pad_token": "<p>"}})
    assert tokenizer.specials == {END_OF_TEXT: END, "<p>": NEXT, "<x>": NEXT + 1}
    assert tokenizer.encode("a<x><p>", allowed_special="all") == [VOCAB["a"], NEXT + 1, NEXT]
    assert NEXT not in tokenizer.encode("a<x><p>")
    assert tokenizer.vocab_size == NEXT + 2 and tokenizer.ordinary_size == NEXT - 1


def test_a_token_of_added_tokens_is_special_where_it_is_named(tmp_path):
    files = {"added_tokens.json": {"<p>": NEXT, "word": NEXT + 1}, MAP: {"pad_token": "<p>"}}
    tokenizer = read(tmp_path, files)
    assert tokenizer.encode("word")[-1] == NEXT + 1
    assert NEXT not in tokenizer.encode("<p>")


def test_the_end_of_text(tmp_path):
    assert read(tmp_path, {CONFIG: {"eos_token": "he"}}).eot_token == VOCAB["he"]
    whole = tokenizer_json(VOCAB, MERGES, added_tokens=[])
    (tmp_path / "json").mkdir()
    with pytest.raises(TokenizerError, match="endoftext"):
        _ = read(tmp_path / "json", {CONFIG: FAST}, whole).eot_token


@pytest.mark.parametrize("files", [{CONFIG: {"pad_token": "<p>"} | FAST}, {CONFIG: FAST}], ids=str)
def test_a_plain_fast_tokenizer_has_the_names_of_its_file_alone(tmp_path, files):
    tokenizer = read(tmp_path, files, tokenizer_json(VOCAB, MERGES))
    expected = {"pad_token": NEXT} if "pad_token" in files[CONFIG] else {}
    assert tokenizer.special_tokens == expected


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [None, tokenizer_json(VOCAB, MERGES)], ids=["pair", "json"])
def test_a_space_before_the_text(tmp_path, whole):
    tokenizer = read(tmp_path, {CONFIG: {"add_prefix_space": True}}, whole)
    assert tokenizer.encode("the") == [VOCAB["Ġthe"]]
    assert tokenizer.encode(" the") == [VOCAB["Ġthe"]]
    assert tokenizer.encode("") == []
    found = tokenizer.encode(f"the{END_OF_TEXT}the", allowed_special="all")
    assert found == [VOCAB["Ġthe"], END, VOCAB["Ġthe"]]


def test_a_space_that_tokenizer_json_asks_for(tmp_path):
    """GPT2Tokenizer follows its own option, a plain fast tokenizer the file's."""
    space = {"type": "ByteLevel", "add_prefix_space": True}
    whole = tokenizer_json(VOCAB, MERGES, pre_tokenizer=space)
    assert read(tmp_path, {}, whole).encode("the") != [VOCAB["Ġthe"]]
    assert read(tmp_path, {CONFIG: FAST}, whole).encode("the") == [VOCAB["Ġthe"]]


@pytest.mark.parametrize("name", ["add_bos_token", "add_eos_token"])
def test_tokens_around_the_text(tmp_path, name):
    with pytest.raises(NoTokenizerError, match=name):
        read(tmp_path, {CONFIG: {name: True}})
    # With a tokenizer.json transformers 5 asks its post-processor alone.
    (tmp_path / "json").mkdir()
    whole = read(tmp_path / "json", {CONFIG: {name: True}}, tokenizer_json(VOCAB, MERGES))
    assert whole.encode("a") == [VOCAB["a"]]


@pytest.mark.parametrize("auto", [["x.Y", None], {"AutoTokenizer": ["x.Y", None]}], ids=str)
def test_a_tokenizer_that_is_a_program(tmp_path, auto):
    with pytest.raises(NoTokenizerError, match="auto_map"):
        read(tmp_path, {CONFIG: {"auto_map": auto}})


def test_unknown_options_are_one_warning(tmp_path):
    known = {"model_max_length": 5, "chat_template": "x", "errors": "replace", "pad_token": None}
    with pytest.warns(RuntimeWarning, match="lower_all, strange_option") as said:
        read(tmp_path, {CONFIG: known | {"strange_option": 1, "lower_all": True}})
    assert len(said) == 1


@pytest.mark.filterwarnings("error")
def test_known_options_pass_in_silence(tmp_path):
    options = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(END): token(END_OF_TEXT, special=True)},
        "bos_token": token(END_OF_TEXT),
        "clean_up_tokenization_spaces": True,
        "errors": "replace",
        "extra_special_tokens": {},
        "model_max_length": 1024,
        "pad_token": None,
        "tokenizer_class": "GPT2Tokenizer",
        "backend": "tokenizers",
    }
    assert read(tmp_path, {CONFIG: options}).decode([VOCAB["a"], VOCAB["Ġ"], VOCAB["."]]) == "a ."


# -- flags ---------------------------------------------------------------------------------------


def with_flags(folder: Path, **flags: bool) -> Tokenizer:
    return read(folder, {CONFIG: {"mask_token": token("<m>", **flags)}})


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        ({}, "a  <m>  b"),
        ({"lstrip": True}, "a<m>  b"),
        ({"rstrip": True}, "a  <m>b"),
        ({"lstrip": True, "rstrip": True}, "a<m>b"),
    ],
    ids=str,
)
def test_white_space_that_a_token_swallows(tmp_path, flags, kept):
    tokenizer = with_flags(tmp_path, **flags)
    ids = tokenizer.encode("a  <m>  b", allowed_special="all")
    assert tokenizer.decode(ids) == kept and ids.count(NEXT) == 1
    assert tokenizer.decode(tokenizer.encode("a  <m>  b")) == "a  <m>  b"
    both = tokenizer.encode("<m> \u3000\n<m>", allowed_special="all")
    assert both == ([NEXT, NEXT] if flags else both)


def test_single_word_is_refused_where_a_text_meets_it(tmp_path):
    tokenizer = with_flags(tmp_path, single_word=True)
    assert tokenizer.encode("a b", allowed_special="all") == tokenizer.encode("a b")
    assert tokenizer.decode([NEXT]) == "<m>"
    with pytest.raises(InputError, match="<m>"):
        tokenizer.encode("a <m> b", allowed_special="all")


def test_many_tokens_with_white_space_between(tmp_path):
    tokenizer = with_flags(tmp_path, lstrip=True, rstrip=True)
    text = "<m> " * 100_000
    assert tokenizer.encode(text, allowed_special="all") == [NEXT] * 100_000


def test_tokens_that_are_normalized_come_second(tmp_path):
    files = {
        "added_tokens.json": {"ab": NEXT, "bc": NEXT + 1},
        MAP: {"pad_token": "bc"},
    }
    found = read(tmp_path, files).encode("abc", allowed_special="all")
    assert found == [VOCAB["a"], NEXT + 1]
