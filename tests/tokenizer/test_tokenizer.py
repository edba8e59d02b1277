"""Tokenizer: file formats, special tokens, streaming, and files that are wrong."""

from __future__ import annotations

import json
import os
import socket
import time

import pytest
from builders import small_bpe, tokenizer_json, write_bpe, write_llmc_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy import load
from gpt2cupy.checkpoint.resolve import EMBEDDED
from gpt2cupy.errors import Gpt2CupyError, InputError, TokenizerError
from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT, Tokenizer
from gpt2cupy.tokenizer import tokenizer as module

TEXTS = [
    "",
    " the the  theta aaaa aaaaa",
    "é e\u0301 \u00a0\u3000 \u200b",
    "中文 العربية 👩\u200d👩\u200d👧 \U0001f600",
    "\x00\x01\x1c\x1f\x7f\x85\n\r\n\t  \n x",
    "I've 12 we'll 3½ ٣",
    END_OF_TEXT,
]
TEMPLATE = [{"Sequence": {"id": "A", "type_id": 0}}]


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("small")
    write_bpe(folder, *small_bpe())
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def embedded() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED["shakespeare"])


# -- encoding and decoding -----------------------------------------------------------------------


def test_merges_apply_in_their_order(small):
    vocab, _ = small_bpe()
    found = small.encode(" the aaaaaé")
    assert found == [vocab[t] for t in ("Ġthe", "Ġ", "aaaa", "a", "Ã©")]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(small, embedded, text):
    for tokenizer in (small, embedded):
        for allowed in ("none", "all"):
            ids = tokenizer.encode(text, allowed_special=allowed)
            assert tokenizer.decode(ids) == text
            assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)


@given(st.text(st.characters(exclude_categories=[])))
def test_every_text_round_trips(embedded, text):
    clean = "".join("\ufffd" if 0xD800 <= ord(c) < 0xE000 else c for c in text)
    if clean == text:
        assert embedded.decode(embedded.encode(text)) == text
    pairs_joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert embedded.encode(text) == embedded.encode(pairs_joined)


def test_lone_surrogates_become_replacement_characters(small):
    assert small.decode(small.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_special_tokens_only_where_allowed(small):
    end = small.eot_token
    text = f"a{END_OF_TEXT}b"
    assert end not in small.encode(text)
    assert end not in small.encode(END_OF_TEXT)
    assert small.encode(END_OF_TEXT, allowed_special="all") == [end]
    assert small.encode(text, allowed_special="all").count(end) == 1
    assert small.encode(text, allowed_special={END_OF_TEXT}).count(end) == 1
    assert small.encode(text, allowed_special=set()) == small.encode(text)


def test_special_tokens_in_a_prompt_are_plain_text():
    with load("shakespeare", device="cpu") as lm:
        ids = lm.encode(f"a{END_OF_TEXT}b").tolist()
        assert lm.tokenizer.eot_token not in ids
        assert lm.tokenizer.decode(ids) == f"a{END_OF_TEXT}b"
        assert lm.tokenizer.eot_token not in lm.score(END_OF_TEXT).tokens


@pytest.mark.parametrize("names", ["some", END_OF_TEXT, {"<|pad|>"}])
def test_unknown_special_tokens_are_refused(small, names):
    with pytest.raises(InputError):
        small.encode("a", allowed_special=names)


def test_ids_outside_the_vocabulary_are_refused(small):
    for id_ in (-1, small.vocab_size):
        with pytest.raises(TokenizerError, match=str(id_)):
            small.decode([id_])


@pytest.mark.parametrize(
    "text", [" " * 1_000_000, "a" * 1_000_000, "\n" * 999_999 + "x", "é!" * 300_000]
)
def test_long_runs_take_no_longer_than_other_text(embedded, text):
    start = time.process_time()
    ids = embedded.encode(text)
    # Quadratic work would take minutes.
    assert time.process_time() - start < 20
    assert embedded.decode(ids) == text


@given(st.text(st.sampled_from(" \t\n\u3000\x1c\x85a1!")))
def test_cutting_long_white_space_changes_nothing(embedded, text):
    whole = embedded.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_LONG", 2)
        assert embedded.encode(text) == whole


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was asked for")

    write_bpe(tmp_path, *small_bpe())
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    for name in ("socket", "create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    for path in (tmp_path, EMBEDDED["shakespeare"]):
        tokenizer = Tokenizer.from_path(path)
        assert tokenizer.decode(tokenizer.encode(" the aaaa")) == " the aaaa"


# -- streaming -----------------------------------------------------------------------------------


@given(st.data())
def test_streamed_text_is_the_decoded_text(small, data):
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1)))
    decoder = small.stream()
    assert "".join([*map(decoder.push, ids), decoder.flush()]) == small.decode(ids)


def test_a_character_is_never_split(small):
    decoder = small.stream()
    pieces = [decoder.push(id_) for id_ in small.encode("a\U0001f600b")]
    assert pieces == ["a", "", "", "", "\U0001f600", "b"]
    assert decoder.flush() == ""


def test_an_unfinished_character_is_shown_at_the_end(small):
    decoder = small.stream()
    assert decoder.push(small.encode("é")[0]) == "é"
    assert decoder.push(BYTE_ID["Ã"]) == ""
    assert decoder.flush() == "\ufffd"


BYTE_ID = {symbol: id_ for id_, symbol in enumerate(BYTE_SYMBOLS)}


# -- formats -------------------------------------------------------------------------------------


def test_formats_agree(small, tmp_path):
    vocab, merges = small_bpe()
    write_bpe(tmp_path / "openai", vocab, merges, ("encoder.json", "vocab.bpe"))
    (tmp_path / "old").mkdir()
    lines = [" ".join(pair) for pair in merges]
    (tmp_path / "old" / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocab, lines)))
    (tmp_path / "new.json").write_text(json.dumps(tokenizer_json(vocab, merges)))
    tokens = [small.decode_bytes([id_]) for id_ in range(small.vocab_size)]
    write_llmc_tokenizer(tmp_path / "gpt2_tokenizer.bin", tokens, small.eot_token)
    write_llmc_tokenizer(tmp_path / "first.bin", tokens, small.eot_token, version=1)
    for name in ("openai", "old", "new.json", "gpt2_tokenizer.bin", "first.bin"):
        other = Tokenizer.from_path(tmp_path / name)
        assert other.vocab_size == small.vocab_size, name
        assert other.eot_token == small.eot_token, name
        for text in TEXTS:
            for allowed in ("none", "all"):
                expected = small.encode(text, allowed_special=allowed)
                assert other.encode(text, allowed_special=allowed) == expected, name
        assert other.decode(range(other.vocab_size)) == small.decode(range(small.vocab_size))


def test_a_template_of_the_text_alone(small, tmp_path):
    """As transformers 5 writes GPT-2's post-processor."""
    template = {"type": "TemplateProcessing", "single": TEMPLATE, "special_tokens": {}}
    written = tokenizer_json(*small_bpe(), post_processor=template)
    (tmp_path / "tokenizer.json").write_text(json.dumps(written))
    assert Tokenizer.from_folder(tmp_path).encode(TEXTS[1]) == small.encode(TEXTS[1])


def test_ids_need_not_be_in_merge_order(small, tmp_path):
    vocab, merges = small_bpe()
    turned = {token: 2 * (len(vocab) - id_) for token, id_ in vocab.items()}
    write_bpe(tmp_path, turned, merges)
    other = Tokenizer.from_folder(tmp_path)
    for text in TEXTS:
        expected = [2 * (len(vocab) - id_) for id_ in small.encode(text, allowed_special="all")]
        assert other.encode(text, allowed_special="all") == expected
    assert other.vocab_size == 2 * len(vocab) + 1


def test_tokens_that_merging_cannot_make_are_never_made(tmp_path):
    # "abc" is only the pair (ab, c); where b and c are merged first, it can never come about.
    vocab = {token: id_ for id_, token in enumerate([*BYTE_SYMBOLS, "bc", "ab", "abc", "lost"])}
    write_bpe(tmp_path, vocab, [("b", "c"), ("a", "b"), ("ab", "c")])
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("abc") == [vocab["a"], vocab["bc"]]
    assert tokenizer.decode([vocab["abc"], vocab["lost"]]) == "abclost"


def test_tokens_that_are_not_written_in_byte_symbols(tmp_path):
    vocab, merges = small_bpe()
    odd = ["two words", "line\nbreak", "日本", "\n"]
    write_bpe(tmp_path, vocab | {token: len(vocab) + i for i, token in enumerate(odd)}, merges)
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert [tokenizer.decode([len(vocab) + i]) for i in range(len(odd))] == odd
    assert max(tokenizer.encode("two words line\nbreak 日本")) < len(vocab)


def test_a_token_with_a_newline_alone_is_not_taken_for_two(tmp_path):
    vocab, merges = small_bpe()
    write_bpe(tmp_path, vocab | {"a\nb": len(vocab)}, merges)
    assert Tokenizer.from_folder(tmp_path).decode([len(vocab)]) == "a\nb"


def test_added_tokens(tmp_path):
    vocab, merges = small_bpe()
    write_bpe(tmp_path, vocab, merges)
    first = len(vocab)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|pad|>": first}))
    entries = {
        str(first): {"content": "<|pad|>", "special": True},
        str(first + 1): {"content": "<|pad|>x", "special": True},
        str(first + 2): {"content": "hello", "special": False},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": entries}))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.vocab_size == first + 3
    assert tokenizer.encode("<|pad|>x<|pad|>", allowed_special="all") == [first + 1, first]
    assert tokenizer.encode("<|pad|>hello")[-1] == first + 2
    assert first not in tokenizer.encode("<|pad|>hello")
    assert tokenizer.decode([first, first + 2]) == "<|pad|>hello"


def test_another_end_of_text(tmp_path):
    vocab, merges = small_bpe()
    vocab["</s>"] = vocab.pop(END_OF_TEXT)
    write_bpe(tmp_path, vocab, merges)
    # As in transformers it is added, behind what the model can know.
    assert Tokenizer.from_folder(tmp_path).eot_token == len(vocab)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    assert Tokenizer.from_folder(tmp_path).eot_token == vocab["</s>"]


# -- files that are wrong ------------------------------------------------------------------------


def refused(path) -> TokenizerError:
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_path(path)
    assert caught.value.where and caught.value.remedy
    return caught.value


def test_no_tokenizer(tmp_path):
    assert "no tokenizer" in refused(tmp_path).what
    nowhere = refused(tmp_path / "nowhere")
    assert nowhere.what == "there is no such file or folder"
    assert nowhere.where == str(tmp_path / "nowhere")
    refused(tmp_path / ("x" * 5000))


@pytest.mark.parametrize(
    "pair", [("h", "é"), ("he", "llo"), ("h",), ("h", "e", "h"), ("", "h"), ("中", "文")], ids=str
)
def test_merges_that_do_not_fit_the_vocabulary(tmp_path, pair):
    vocab, merges = small_bpe()
    write_bpe(tmp_path, vocab, merges)
    with (tmp_path / "merges.txt").open("a", encoding="utf-8") as file:
        file.write(" ".join(pair) + "\n")
    assert f"merge {len(merges)} does not fit" in refused(tmp_path).what


def test_merges_out_of_order(tmp_path):
    vocab, merges = small_bpe()
    write_bpe(tmp_path, vocab, merges[::-1])
    tokenizer = Tokenizer.from_folder(tmp_path)
    # (aa, aa) is of a lower rank than (a, a), which has to make its parts.
    assert tokenizer.encode("aaaa the") == [vocab["aaaa"], vocab["Ġthe"]]
    assert tokenizer.decode(tokenizer.encode(" aaaaa theé")) == " aaaaa theé"
    assert tokenizer.vocab_size == len(vocab)


def test_a_merge_that_stands_twice(tmp_path):
    """Its last rank counts, as in transformers: here the, once made first, comes after h e."""
    vocab, merges = small_bpe()
    write_bpe(tmp_path, vocab, [*merges, ("Ġ", "t"), ("a", "a")])
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode(" the aaaa") == [vocab[t] for t in ("Ġthe", "Ġ", "aaaa")]


@pytest.mark.parametrize("text", [" " * 200_000, "a" * 200_000, "ab!" * 100_000], ids=len)
def test_long_runs_with_merges_out_of_order(tmp_path, text):
    vocab, merges = small_bpe()
    write_bpe(tmp_path, vocab, merges[::-1])
    tokenizer = Tokenizer.from_folder(tmp_path)
    start = time.process_time()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.process_time() - start < 20


def test_a_vocabulary_without_all_bytes(tmp_path):
    vocab, merges = small_bpe()
    del vocab["ÿ"]
    write_bpe(tmp_path, vocab, merges)
    assert "0xff" in refused(tmp_path).what


@pytest.mark.parametrize("value", ["7", 7.0, None, True, -1, 2**31, 0])
def test_ids_that_are_none(tmp_path, value):
    vocab, merges = small_bpe()
    write_bpe(tmp_path, vocab | {"he": value}, merges)
    refused(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"a": 1' + "0" * 5000 + "}"])
@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "tokenizer_config.json"])
def test_broken_json(tmp_path, name, text):
    write_bpe(tmp_path, *small_bpe())
    (tmp_path / name).write_text(text)
    assert str(tmp_path / name) in refused(tmp_path).where


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.json"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_no_plain_file(tmp_path, name, kind):
    if name != "tokenizer.json":
        write_bpe(tmp_path, *small_bpe())
        (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name) if kind == "pipe" else (tmp_path / name).mkdir()
    refused(tmp_path)
    if name == "tokenizer.json":
        refused(tmp_path / name)


@pytest.mark.parametrize(
    "changes",
    [
        {"type": "WordPiece"},
        {"type": "Unigram"},
        {"dropout": 0.1},
        {"ignore_merges": True},
        {"end_of_word_suffix": "</w>"},
        {"continuing_subword_prefix": "##"},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}},
        {"decoder": None},
        {"post_processor": {"type": "TemplateProcessing"}},
        *(
            {"post_processor": {"type": "TemplateProcessing", "single": single}}
            for single in (3, [], [3], [*TEMPLATE, *TEMPLATE], [{"SpecialToken": {}}, *TEMPLATE])
        ),
        {"model": 3},
        {"vocab": []},
        {"merges": {}},
        {"merges": [["a"]]},
        {"merges": [3]},
        {"added_tokens": 3},
        {"added_tokens": [3]},
        {"added_tokens": [{"content": "", "id": 3}]},
        {"added_tokens": [{"content": "new", "id": 3}]},
        {"added_tokens": [{"content": "he", "id": 9999}]},
    ],
    ids=str,
)
def test_other_kinds_of_tokenizer_json(tmp_path, changes):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(tokenizer_json(*small_bpe(), **changes)))
    refused(tmp_path)


@pytest.mark.parametrize("option", ["add_eos_token", "add_bos_token"])
def test_options_that_would_change_ids(tmp_path, option):
    write_bpe(tmp_path, *small_bpe())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({option: False}))
    Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({option: True}))
    assert option in refused(tmp_path).what


def test_broken_llmc_files(tmp_path, small):
    path = tmp_path / "tokenizer.bin"
    tokens = [small.decode_bytes([id_]) for id_ in range(small.vocab_size)]
    write_llmc_tokenizer(path, tokens, small.eot_token)
    whole = path.read_bytes()
    wrong = [b"", whole[:100], whole[:1030], whole[:-1], whole + b"x", whole[:1024] + b"\0" * 9]
    for place, value in [(0, 7), (1, 3), (2, -1), (2, 2**31 - 1), (3, -1), (3, 9999)]:
        number = value.to_bytes(4, "little", signed=True)
        wrong.append(whole[: 4 * place] + number + whole[4 * place + 4 :])
    for data in wrong:
        path.write_bytes(data)
        refused(path)
    write_llmc_tokenizer(path, [*tokens, b"he"], small.eot_token)
    refused(path)
    write_llmc_tokenizer(path, tokens[1:], small.eot_token - 1)
    refused(path)


def test_a_model_in_place_of_a_tokenizer(tmp_path):
    path = tmp_path / "gpt2_124M.bin"
    path.write_bytes((20240326).to_bytes(4, "little") + bytes(1020))
    assert "gpt2_tokenizer.bin" in refused(path).remedy


@pytest.mark.filterwarnings("ignore:unknown options")
@settings(max_examples=200)
@given(st.data())
def test_damaged_files_raise_only_our_errors(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    write_bpe(folder, *small_bpe())
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    name = data.draw(st.sampled_from(["vocab.json", "merges.txt", "tokenizer_config.json"]))
    whole = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, max(len(whole) - 1, 0)))
        size = data.draw(st.sampled_from([0, 1, 1, 8]))
        whole[place : place + size] = data.draw(st.binary(max_size=4))
    (folder / name).write_bytes(whole)
    try:
        tokenizer = Tokenizer.from_folder(folder)
        assert isinstance(tokenizer.decode(tokenizer.encode(" the aaaa é")), str)
    except Gpt2CupyError as error:
        str(error).encode()
