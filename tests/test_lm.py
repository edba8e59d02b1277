"""LanguageModel on the CPU: text, its ends, errors, and that it works after them."""

from __future__ import annotations

import numpy as np
import pytest
from builders import small_bpe, write_bpe

import gpt2cupy
from gpt2cupy import GPT2, LanguageModel, SamplingParams
from gpt2cupy.errors import InputError
from gpt2cupy.generation.text import GrowingText
from gpt2cupy.tokenizer import Tokenizer

TEXT = "To be, or not to be: that is the question.\n"


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


@pytest.fixture
def fresh():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


def forcing(tokens):
    """Options that make a model say these tokens: falling biases, and a penalty once said."""
    assert len(set(tokens)) == len(tokens), "a token said cannot come again"
    bias = {token: 1e6 - 1e3 * place for place, token in enumerate(tokens)}
    return {"logit_bias": bias, "presence_penalty": 5e5, "max_new_tokens": len(tokens)}


# -- streaming -----------------------------------------------------------------------------------


def test_a_stream_is_the_completion_in_pieces(lm):
    options = {"max_new_tokens": 40, "temperature": 0.9, "seed": 3}
    pieces = list(lm.stream("ROMEO:", **options))
    whole = lm.generate("ROMEO:", **options)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.token for piece in pieces] == whole.tokens
    assert [piece.logprob for piece in pieces] == whole.logprobs
    assert [piece.finish_reason for piece in pieces] == [None] * 39 + ["length"]
    assert pieces[0].tokens_per_second == 0 < pieces[-1].tokens_per_second
    assert len({piece.prefill_seconds for piece in pieces}) == 1
    assert whole.text == lm.tokenizer.decode(whole.tokens) and whole.finish_reason == "length"


def test_streaming_never_splits_a_character(lm):
    tokens = lm.tokenizer.encode("é€😀")
    assert len(tokens) > 3, "these characters take several tokens each"
    row = GrowingText(lm.tokenizer, ())
    texts = [row.push(token, None)[0] for token in tokens]
    assert "".join(texts) == "é€😀" and "\ufffd" not in "".join(texts)
    assert [text for text in texts if text] == ["é", "€", "😀"]


def test_a_forced_character_arrives_whole(lm):
    tokens = lm.tokenizer.encode("é€")
    pieces = list(lm.stream("a", **forcing(tokens)))
    assert [piece.token for piece in pieces] == tokens
    assert [piece.text for piece in pieces if piece.text] == ["é", "€"]


def test_an_unfinished_character_ends_as_a_replacement(lm):
    tokens = lm.tokenizer.encode("€")[:-1]
    done = lm.generate("a", **forcing(tokens))
    assert done.tokens == tokens and done.text == "\ufffd"


@pytest.mark.parametrize(
    "pieces",
    [
        [(290, "\ufffd")],
        [("a", "a"), (299, "\ufffd"), ("b", "b")],
        # An unfinished character before it is one of its own.
        [("é", ""), (290, "\ufffd\ufffd"), ("a", "a")],
        [(290, "\ufffd"), ("é", ""), (291, "\ufffd\ufffd")],
    ],
    ids=str,
)
def test_ids_without_text_are_replacement_characters(padded, pieces):
    """A model may have more rows than its tokenizer has tokens."""
    ids = [
        each if isinstance(each, int) else padded.tokenizer.encode(each)[0] for each, _ in pieces
    ]
    streamed = list(padded.stream("a", **forcing(ids)))
    assert [(piece.token, piece.text) for piece in streamed] == [
        (id_, text) for id_, (_, text) in zip(ids, pieces, strict=True)
    ]
    done = padded.generate(["a", "b"], **forcing(ids))[1]
    assert (done.tokens, done.text) == (ids, "".join(text for _, text in pieces))
    assert padded.score([*ids, 298]).tokens[-1] == 298


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model of 300 rows with a tokenizer of fewer tokens, which splits é in two bytes."""
    folder = tmp_path_factory.mktemp("padded")
    vocab, merges = small_bpe()
    write_bpe(folder, vocab, merges[:-1])
    config = gpt2cupy.GPT2Config(vocab_size=300, n_positions=32, n_embd=8, n_layer=1, n_head=1)
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.vocab_size < 290
    with LanguageModel(GPT2.random(config, device="cpu"), tokenizer, "padded") as model:
        yield model


# -- where a text ends ---------------------------------------------------------------------------


def push_all(lm, text, stops):
    """The pieces of a row that is fed a text byte by byte, and why it ended."""
    row, shown = GrowingText(lm.tokenizer, stops), []
    singles = [lm.tokenizer.encode(chr(byte))[0] for byte in text.encode()]
    for place, token in enumerate(singles):
        last = "length" if place == len(singles) - 1 else None
        piece, reason = row.push(token, last)
        shown.append(piece)
        if reason:
            return shown, reason
    raise AssertionError("the row did not end")


@pytest.mark.parametrize(
    "text, stops, shown, reason",
    [
        ("one STOP two", ("STOP",), "one ", "stop"),
        ("one STO two", ("STOP",), "one STO two", "length"),
        ("one STO", ("STOP",), "one STO", "length"),
        ("SSTOP", ("STOP",), "S", "stop"),
        ("aabaab", ("aab",), "", "stop"),
        ("abcd", ("cd", "bc"), "a", "stop"),
        ("xyz", ("z",), "xy", "stop"),
        ("plain", (), "plain", "length"),
    ],
)
def test_stop_strings_across_tokens(lm, text, stops, shown, reason):
    pieces, why = push_all(lm, text, stops)
    assert ("".join(pieces), why) == (shown, reason)


def test_text_is_held_back_only_while_it_may_become_a_stop_string(lm):
    pieces, _ = push_all(lm, "one STO two", ("STOP",))
    assert pieces == ["o", "n", "e", " ", "", "", "", "STO ", "t", "w", "o"]


def test_a_stop_string_ends_stream_and_completion_alike(lm):
    free = lm.generate("ROMEO:", max_new_tokens=60).text
    stop = free[10:16]
    assert len(lm.tokenizer.encode(stop)) > 1
    done = lm.generate("ROMEO:", max_new_tokens=60, stop=stop)
    pieces = list(lm.stream("ROMEO:", max_new_tokens=60, stop=stop))
    expected = free[: free.index(stop)]
    assert done.text == "".join(piece.text for piece in pieces) == expected
    assert done.finish_reason == pieces[-1].finish_reason == "stop"
    assert len(done.tokens) == len(pieces) < 60


def test_end_of_text_ends_and_is_not_shown(lm):
    eos = lm.tokenizer.eot_token
    done = lm.generate("ROMEO:", logit_bias={eos: 1e6}, max_new_tokens=5)
    assert (done.text, done.tokens, done.finish_reason) == ("", [eos], "eos")
    later = lm.generate("ROMEO:", logit_bias={eos: 1e6}, max_new_tokens=5, min_new_tokens=3)
    assert later.finish_reason == "eos" and len(later.tokens) == 4 and later.text
    without = lm.generate("ROMEO:", logit_bias={eos: 1e6}, max_new_tokens=5, eos_token_id=-1)
    assert without.finish_reason == "length" and without.tokens == [eos] * 5


def test_no_new_tokens(lm):
    assert list(lm.stream("ROMEO:", max_new_tokens=0)) == []
    done = lm.generate("ROMEO:", max_new_tokens=0)
    assert (done.text, done.tokens, done.finish_reason) == ("", [], "length")


def test_the_whole_context_can_be_used(lm):
    ids = [5] * lm.config.n_positions
    assert len(lm.generate(ids, max_new_tokens=1).tokens) == 1
    assert len(lm.generate(ids[3:], max_new_tokens=None, eos_token_id=-1).tokens) == 4


# -- prompts -------------------------------------------------------------------------------------


def test_an_empty_prompt_starts_from_end_of_text(lm):
    expected = lm.generate([lm.tokenizer.eot_token], max_new_tokens=8)
    assert lm.generate("", max_new_tokens=8) == expected
    assert lm.generate(max_new_tokens=8) == expected
    assert expected.prompt_tokens == 1


def test_ids_are_prompts(lm):
    ids = lm.tokenizer.encode("ROMEO:")
    expected = lm.generate("ROMEO:", max_new_tokens=8)
    for prompt in (ids, tuple(ids), np.array(ids), np.array(ids, np.uint16)):
        assert lm.generate(prompt, max_new_tokens=8) == expected


def test_a_ragged_list_equals_each_alone(lm):
    prompts = ["R", "To be, or not to be", [5, 6, 7], "", "JULIET:\nO Romeo, Romeo!"]
    options = {"max_new_tokens": 12, "temperature": 0.8, "seed": 5}
    alone = [lm.generate(prompt, **options) for prompt in prompts]
    for max_batch in (1, 2, 16):
        together = lm.generate(prompts, max_batch=max_batch, **options)
        assert [each.tokens for each in together] == [each.tokens for each in alone]
        assert [each.text for each in together] == [each.text for each in alone]
        assert [each.prompt_tokens for each in together] == [each.prompt_tokens for each in alone]
    assert lm.generate([], **options) == []


def test_several_continuations(lm):
    options = {"max_new_tokens": 12, "temperature": 1.0}
    three = lm.generate("ROMEO:", n=3, seed=7, **options)
    assert len({each.text for each in three}) == 3
    # Number i uses seed + i.
    for place, each in enumerate(three):
        assert each.tokens == lm.generate("ROMEO:", seed=7 + place, **options).tokens
    lists = lm.generate(["ROMEO:", "JULIET:"], n=2, seed=7, **options)
    assert [len(group) for group in lists] == [2, 2]
    assert [each.tokens for each in lists[0]] == [each.tokens for each in three[:2]]


def test_the_most_probable_tokens_come_along(lm):
    done = lm.generate("ROMEO:", max_new_tokens=4, logprobs=3)
    assert [len(top) for top in done.top] == [3] * 4
    for token, logprob, top in zip(done.tokens, done.logprobs, done.top, strict=True):
        assert top[0][0] == token and top[0][1] == pytest.approx(logprob, abs=1e-5)
        assert top == sorted(top, key=lambda entry: -entry[1])


def test_parameters_and_options_together(lm):
    params = SamplingParams(max_new_tokens=9, temperature=0.5, seed=1)
    assert len(lm.generate("a", params).tokens) == 9
    assert len(lm.generate("a", params, max_new_tokens=3).tokens) == 3


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, options, says",
    [
        ([5] * 513, {}, "513 tokens, the context 512"),
        ([5] * 500, {"max_new_tokens": 14}, "500 tokens of prompt and 14 new ones"),
        ([5], {"max_new_tokens": 600}, "1 token of prompt and 600 new ones"),
        ([2048], {}, "token id 2048"),
        ([5, -1], {}, "token id -1"),
        ([2**63], {}, "token id 9223372036854775808"),
        ([5, [6]], {}, "rows of one length"),
        ([5, "a"], {}, "must be integers"),
        (["a", 5], {}, r"cannot be an int \(prompt 1, 5\)"),
        (["a", None], {}, r"cannot be None \(prompt 1, None\)"),
        (b"ROMEO:", {}, "cannot be a bytes"),
        (np.array(5), {}, "cannot be an ndarray"),
        ([[[5], [6]]], {}, "must be integers"),
        (["ROMEO:", [5, 4096]], {}, "token id 4096"),
        ("a", {"logit_bias": {2048: 1.0}}, "token id 2048"),
        ("a", {"eos_token_id": 5000}, "token id 5000"),
        ("a", {"temprature": 1.0}, "temprature"),
        ("a", {"temperature": -1.0}, "temperature"),
        ("a", {"params": {"seed": 1}}, "params cannot be a dict"),
        *(("a", {"max_batch": value}, "max_batch") for value in (0, -1, 1.5, "2")),
    ],
    ids=str,
)
def test_errors_leave_the_model_usable(lm, prompt, options, says):
    expected = lm.generate("ROMEO:", max_new_tokens=4)
    with pytest.raises(InputError, match=says) as caught:
        lm.generate(prompt, **options)
    assert caught.value.where and caught.value.remedy
    assert lm.generate("ROMEO:", max_new_tokens=4) == expected


def test_stream_refuses_before_its_first_piece(lm):
    # At the call, not at the first iteration: a server has not yet answered then.
    with pytest.raises(InputError, match="token id 2048"):
        lm.stream([2048])
    with pytest.raises(InputError, match="one continuation"):
        lm.stream("a", n=2)


def test_calling_checks_its_ids(lm):
    assert lm([[1, 2, 3]]).shape == (1, 3, lm.config.vocab_size)
    assert lm([[1, 2, 3]]).dtype == np.float32
    wrong_ids = ([[2048]], [[-1]], [[0.5]], [[]], [[1] * 513], [[1, 2], [3]], None, "a", {1: 2})
    for wrong in wrong_ids:
        for call in (lm, lm.hidden_states):
            with pytest.raises(InputError):
                call(wrong)


def test_ids_of_an_array_that_is_not_of_the_host(lm):
    class Tensor:
        def __array__(self, *args, **kwargs):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")

    with pytest.raises(InputError, match="cannot be a Tensor: can't convert"):
        lm(Tensor())


def test_hidden_states_of_every_layer(lm):
    states = lm.hidden_states([[1, 2, 3], [4, 5, 6]])
    layers, channels = lm.config.n_layer, lm.config.n_embd
    assert (states.shape, states.dtype) == ((layers + 1, 2, 3, channels), np.float32)
    weights = lm.model.weights
    np.testing.assert_array_equal(states[0, 1], weights.wte[[4, 5, 6]] + weights.wpe[:3])
    logits = states[-1] @ weights.lm_head[: lm.config.vocab_size].T
    np.testing.assert_allclose(logits, lm([[1, 2, 3], [4, 5, 6]]), rtol=0, atol=1e-4)


def test_a_stream_left_early_frees_the_model(fresh):
    expected = fresh.generate("ROMEO:", max_new_tokens=6)
    stream = fresh.stream("JULIET:", max_new_tokens=50)
    next(stream)
    stream.close()
    assert fresh.generate("ROMEO:", max_new_tokens=6) == expected


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(lm):
    config = gpt2cupy.GPT2Config(vocab_size=100, n_positions=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(InputError, match="different checkpoints"):
        LanguageModel(GPT2.random(config, device="cpu"), lm.tokenizer, "odd")


def test_prompts_of_a_wrong_kind_are_refused(lm):
    for wrong in (None, 7, [1.5, 2], [None]):
        with pytest.raises(InputError):
            lm.generate(wrong, max_new_tokens=2)
