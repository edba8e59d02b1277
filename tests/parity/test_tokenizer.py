"""Token ids against transformers' GPT2TokenizerFast, on GPT-2's own merges and on others."""

from __future__ import annotations

import copy
import random

import pytest
from builders import write_bpe
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy.checkpoint.resolve import EMBEDDED
from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT, Tokenizer

ODD = [
    *("", " ", "  ", "   a", "a   ", "\n\n", " \n ", "\t\ta", "\r\n", "\u3000\u3000x", "\xa0 \xa0"),
    *("'s", "'S", "don't 've'll'", "\u2019s", "123abc", "½²٣", "a1!b2?", "_x_"),
    *("e\u0301", "\u0301", "क्षि", "한국어", "中文字", "العربية", "\u200d", "\ufeff", "\u202e"),
    *("👩\u200d👩\u200d👧", "🇫🇷", "\U0001f44d\U0001f3fd", "\U0010ffff"),
    *(chr(code) for code in (0, 1, 7, 11, 12, 27, 28, 29, 30, 31, 127, 133, 0x2028, 0x180E)),
    *(END_OF_TEXT, "<|endoftext", "\ufffd"),
]
# Any text, and text that keeps meeting what tokenizers trip over.
texts = st.one_of(
    st.text(), st.lists(st.one_of(st.sampled_from(ODD), st.text(max_size=3))).map("".join)
)


@pytest.fixture(scope="module")
def gpt2(gpt2_folder) -> tuple[Tokenizer, object]:
    """Ours and theirs."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2TokenizerFast(
        str(gpt2_folder / "vocab.json"), str(gpt2_folder / "merges.txt")
    )
    return Tokenizer.from_folder(gpt2_folder), theirs


def test_the_vocabulary_is_gpt2s(gpt2):
    ours, theirs = gpt2
    assert ours.vocab_size == len(theirs) == 50257
    assert ours.eot_token == 50256
    assert ours.encode("Hello world") == [15496, 995]


@settings(max_examples=1000)
@given(texts)
def test_any_text(gpt2, text):
    ours, theirs = gpt2
    ids = theirs(text)["input_ids"]
    assert ours.encode(text, allowed_special="all") == ids
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text


@settings(max_examples=200)
@given(texts)
def test_special_tokens_as_plain_text(gpt2, text):
    ours, theirs = gpt2
    ids = theirs(text + END_OF_TEXT + text, split_special_tokens=True)["input_ids"]
    assert ours.encode(text + END_OF_TEXT + text) == ids


# Ideographs and syllables, alike from the first to the last, and planes with little in them.
ALIKE = (range(0x3400, 0xA000), range(0xAC00, 0xD7A4), range(0x17000, 0x18D00))
ALIKE += (range(0x20000, 0xE0000), range(0xE0200, 0x110000))


def test_every_character_in_every_company(gpt2):
    """Letter, digit, space, or none of them: both must think the same of each character."""
    ours, theirs = gpt2
    codes = set(range(0x110000)).difference(range(0xD800, 0xE000), *ALIKE)
    for block in ALIKE:  # of which samples do, and what lies around the last one
        codes.update(block[::251], block[-1:])
    characters = [chr(code) for code in sorted(codes)]
    for start in range(0, len(characters), 4096):
        text = "".join(f"a{c}b 1{c}2 !{c}?  {c} \n" for c in characters[start : start + 4096])
        assert ours.encode(text) == theirs.backend_tokenizer.encode(text).ids, hex(start)


@given(st.lists(st.integers(0, 50256)))
def test_any_ids_decode_alike(gpt2, ids):
    ours, theirs = gpt2
    assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", [" " * 300_000 + "x", "a" * 100_000, "\n \t" * 100_000], ids=len)
def test_long_runs(gpt2, text):
    ours, theirs = gpt2
    assert ours.encode(text) == theirs.backend_tokenizer.encode(text).ids


@pytest.fixture(scope="module")
def embedded() -> tuple[Tokenizer, object]:
    transformers = pytest.importorskip("transformers")
    folder = EMBEDDED["shakespeare"]
    return Tokenizer.from_folder(folder), transformers.GPT2TokenizerFast.from_pretrained(folder)


@settings(max_examples=300)
@given(texts)
def test_the_embedded_tokenizer(embedded, text):
    ours, theirs = embedded
    assert ours.encode(text, allowed_special="all") == theirs(text)["input_ids"]


@pytest.mark.parametrize("seed", range(40))
def test_any_merges(tmp_path, seed):
    """Merges in any order, with tokens that several pairs make and ones that none can."""
    models = pytest.importorskip("tokenizers.models")
    tokenizers = pytest.importorskip("tokenizers")
    rng = random.Random(seed)
    letters = "abc"[: rng.randint(1, 3)]
    vocab = {symbol: id_ for id_, symbol in enumerate(BYTE_SYMBOLS)}
    tokens, merges = list(letters), []
    for _ in range(rng.randint(1, 25)):
        left, right = rng.choice(tokens), rng.choice(tokens)
        again = (left, right) in merges and rng.random() < 0.8
        if not again and len(left + right) <= 12:
            merges.append((left, right))
            tokens += [left + right] * (left + right not in vocab)
            vocab.setdefault(left + right, len(vocab))
    ids = list(vocab.values())
    rng.shuffle(ids)
    vocab = dict(zip(vocab, ids, strict=True))
    write_bpe(tmp_path, vocab, merges)
    theirs = tokenizers.Tokenizer(models.BPE(vocab, merges))
    theirs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = Tokenizer.from_folder(tmp_path)
    for _ in range(50):
        text = "".join(rng.choices(letters, k=rng.randint(1, 40)))
        assert ours.encode(text) == theirs.encode(text).ids, (merges, text)


@settings(max_examples=50)
@given(texts)
def test_what_transformers_saves_is_read_alike(saved, text):
    ours, theirs = saved
    assert ours.encode(text, allowed_special="all") == theirs(text)["input_ids"]


@pytest.fixture(scope="module")
def saved(gpt2, tmp_path_factory) -> tuple[Tokenizer, object]:
    """GPT-2's tokenizer as save_pretrained writes it, with a token added of either kind."""
    _, theirs = gpt2
    theirs = copy.deepcopy(theirs)
    theirs.add_special_tokens({"pad_token": "<|pad|>"})
    theirs.add_tokens(["don't"])
    folder = tmp_path_factory.mktemp("saved")
    theirs.save_pretrained(folder)
    return Tokenizer.from_folder(folder), theirs


def test_tokens_added_in_transformers(saved):
    ours, theirs = saved
    text = "I don't know<|pad|>don't<|endoftext|>"
    assert ours.vocab_size == len(theirs) == 50259
    assert ours.encode(text, allowed_special="all") == theirs(text)["input_ids"]
    assert ours.decode(theirs(text)["input_ids"]) == text
