"""What people pass and what comes back: forms of ids, places in errors, names and equality."""

from __future__ import annotations

import dataclasses
import inspect
import typing
import warnings
from collections import UserDict

import numpy as np
import pytest
from builders import TINY, small_bpe, write_bpe

import gpt2cupy
from gpt2cupy import GPT2, Completion, GPT2Config, LanguageModel, SamplingParams, Score
from gpt2cupy.errors import InputError, NoTokenizerError
from gpt2cupy.tokenizer import NoTokenizer, Tokenizer

IDS = [5, 9, 30]


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


class Tensor:
    """As far as PyTorch's is looked at: on another device until it is fetched."""

    def __init__(self, values, place="cuda", tracked=True):
        self.values, self.place, self.tracked = np.array(values), place, tracked

    def detach(self):
        return Tensor(self.values, self.place, False)

    def cpu(self):
        return Tensor(self.values, "cpu", self.tracked)

    def numpy(self):
        if self.place != "cpu" or self.tracked:
            raise TypeError("can't convert it to numpy")
        return self.values

    def __array__(self, *args, **kwargs):
        raise TypeError("can't convert it to numpy")


# -- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor", [Tensor, "torch"])
def test_tensors_are_ids(lm, tensor):
    if tensor == "torch":
        tensor = pytest.importorskip("torch").tensor
    expected = lm.generate(IDS, max_new_tokens=4)
    assert lm.generate(tensor(IDS), max_new_tokens=4) == expected
    assert lm.generate(tensor([IDS]), max_new_tokens=4) == [expected]
    assert lm.generate([tensor(IDS), tensor(IDS[:1])], max_new_tokens=4)[0].tokens == (
        lm.generate([IDS, IDS[:1]], max_new_tokens=4)[0].tokens
    )
    assert "".join(p.text for p in lm.stream(tensor(IDS), max_new_tokens=4)) == expected.text
    assert lm.score(tensor(IDS)) == lm.score(IDS)
    assert lm.decode(tensor(IDS)) == lm.decode(IDS)
    np.testing.assert_array_equal(lm(tensor([IDS])), lm([IDS]))
    np.testing.assert_array_equal(lm.hidden_states(tensor([IDS])), lm.hidden_states([IDS]))


@pytest.mark.parametrize("make", [list, np.array, Tensor])
def test_what_a_tokenizer_of_transformers_returns(lm, make):
    one = UserDict(input_ids=make(IDS), attention_mask=make([1, 1, 1]))
    assert lm.generate(one, max_new_tokens=3) == lm.generate(IDS, max_new_tokens=3)
    # Padding, on either side, is no part of a prompt.
    padded = {"input_ids": make([[0, 5, 9], [5, 9, 30], [7, 0, 0]])}
    padded["attention_mask"] = make([[0, 1, 1], [1, 1, 1], [1, 0, 0]])
    found = lm.generate(padded, max_new_tokens=3)
    assert [each.prompt_ids for each in found] == [[5, 9], [5, 9, 30], [7]]
    assert [e.tokens for e in found] == [
        e.tokens for e in lm.generate([[5, 9], IDS, [7]], max_new_tokens=3)
    ]
    with pytest.raises(InputError, match="attention_mask does not fit"):
        lm.generate({"input_ids": IDS, "attention_mask": [1]})


def test_scalars_of_numpy(lm):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"max_new_tokens": np.int64(3), "seed": np.uint64(2**63), "top_k": np.int8(3)}
        plain = {"max_new_tokens": 3, "seed": 2**63, "top_k": 3, "n": 2}
        found = lm.generate(["a"], max_batch=np.int32(2), n=np.int16(2), **options)
        assert found == lm.generate(["a"], **plain)
    assert lm.score("To be", window=np.int64(8), stride=np.uint8(4), bos=np.bool_(True))
    bias = lm.generate("a", max_new_tokens=1, logit_bias={np.int64(7): np.float32(1e6)})
    assert bias.tokens == [7]


def test_decode_is_the_text_of_ids(lm):
    ids = lm.encode("To be, or not")
    assert lm.decode(ids) == lm.decode(ids.tolist()) == "To be, or not"
    assert lm.decode([]) == ""
    for wrong in ([5000], [-1], [1.5], None):
        with pytest.raises(InputError):
            lm.decode(wrong)


# -- settings ------------------------------------------------------------------------------------


def test_an_unset_limit_is_what_fits(tmp_path):
    write_bpe(tmp_path, *small_bpe())
    config = GPT2Config(vocab_size=263, n_positions=220, n_embd=8, n_layer=1, n_head=1)
    model = GPT2.random(config, device="cpu")
    options = {"eos_token_id": -1}
    long = [5] * (config.n_positions - 9)
    with LanguageModel(model, Tokenizer.from_folder(tmp_path), "small") as lm:
        assert len(lm.generate(long, **options).tokens) == 10
        assert [len(c.tokens) for c in lm.generate([long, [5]], **options)] == [10, 200]
        assert len(list(lm.stream(long, **options))) == 10
        with pytest.raises(InputError, match="10 new tokens fit: lower max_new_tokens or shorten"):
            lm.generate(long, max_new_tokens=200)
        with pytest.raises(InputError, match="1 new token fits: lower min_new_tokens or"):
            lm.generate([5] * config.n_positions, min_new_tokens=2)


def test_a_token_can_be_banned(lm):
    first = lm.generate("ROMEO:", max_new_tokens=2)
    ban = {first.tokens[0]: -float("inf"), first.tokens[1]: -np.inf}
    for options in ({}, {"temperature": 2.0, "seed": 1}, {"repetition_penalty": 0.5}):
        found = lm.generate("ROMEO:", max_new_tokens=12, logit_bias=ban, **options)
        assert not set(ban) & set(found.tokens) and np.isfinite(found.logprobs).all()
    everything = dict.fromkeys(range(lm.config.vocab_size), -np.inf)
    with pytest.raises(InputError, match="every token of the vocabulary is banned"):
        lm.generate("a", logit_bias=everything)
    del everything[7]
    assert lm.generate("a", logit_bias=everything, max_new_tokens=2).tokens == [7, 7]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"seed": 5}, "seed=5 does nothing without a temperature"),
        ({"n": 3}, "n=3 does nothing"),
        ({"top_k": 40, "top_p": 0.9}, "top_k=40, top_p=0.9 do nothing"),
        ({"params": SamplingParams(min_p=0.5)}, "min_p=0.5 does nothing"),
        ({"temperature": 1e-39, "seed": 0}, "seed=0 does nothing"),
    ],
    ids=str,
)
def test_an_option_that_does_nothing_is_a_warning(lm, options, says):
    with pytest.warns(RuntimeWarning, match=says) as seen:
        lm.generate("a", max_new_tokens=1, **options)
    assert [each.filename for each in seen] == [__file__]
    if "n" not in options:
        with pytest.warns(RuntimeWarning, match=says) as seen:
            lm.stream("a", max_new_tokens=1, **options)
        assert seen[0].filename == __file__
    lm.generate("a", max_new_tokens=1, **options | {"temperature": 1.0})


# -- errors --------------------------------------------------------------------------------------


def test_an_error_of_a_list_says_which_prompt(lm):
    long = "To be, or not to be: that is the question" * 60
    for prompts, place in (
        (["a", long], "prompt 1, 'To be, or not to be: t…"),
        (["a", [5, 4096]], "prompt 1, [5, 4096]"),
        ([[5, 1.5], "a"], "prompt 0, [5, 1.5]"),
        (["a", "b", 7], "prompt 2, 7"),
    ):
        with pytest.raises(InputError) as caught:
            lm.generate(prompts)
        assert caught.value.where == place
    for prompt in (long, [5, 4096], [5, 1.5], 7):
        with pytest.raises(InputError) as caught:
            lm.generate(prompt)
        assert caught.value.where in ("prompt", "ids")


def test_the_remedy_fits_the_input(lm):
    for call, says in (
        (lambda: lm("To be"), r"cannot be text, as .*'To be'.* is .*lm\(lm.encode\(text\)\)"),
        (lambda: lm(["To", "be"]), r"lm\(lm.encode\(text\)\)"),
        (lambda: lm.generate([5, 1.5]), "must be integers, not 1.5, a float"),
        (lambda: lm.generate([True]), "must be integers, not True, a bool"),
        (lambda: lm.generate([None]), r"must be integers, not None \("),
        (lambda: lm.generate("a", eos_token_id=[-1]), "-1 alone, not in a list"),
        (lambda: lm.generate(["a", 5.5]), r"cannot be a float \(prompt 1, 5.5\)"),
        (lambda: lm.generate(5), "cannot be an int"),
        (lambda: lm.generate("a", params=5), "params cannot be an int"),
        (lambda: gpt2cupy.load(5), "cannot be an int"),
        (lambda: gpt2cupy.load(tokenizer=5), "cannot be an int"),
        (lambda: lm.score("a", bos="yes"), "bos is 'yes'.*True or False"),
        (lambda: lm.generate("a", generation_config="no"), "generation_config is 'no'"),
    ):
        with pytest.raises(InputError, match=says):
            call()


@pytest.mark.parametrize("name", ["dtype", "device", "revision", "quantize", "batch_invariant"])
def test_values_in_messages_are_cut(name):
    with pytest.raises(gpt2cupy.Gpt2CupyError) as caught:
        gpt2cupy.load("shakespeare", **{name: "x" * 5000})
    assert len(str(caught.value)) < 250


# -- results -------------------------------------------------------------------------------------


def test_a_completion_says_where_it_came_from(lm):
    drawn = lm.generate("ROMEO:", temperature=1.0, max_new_tokens=5)
    assert drawn.seed is not None
    again = lm.generate("ROMEO:", temperature=1.0, max_new_tokens=5, seed=drawn.seed)
    assert again == drawn and hash(again) == hash(drawn)
    assert drawn.prompt_ids == lm.encode("ROMEO:").tolist()
    assert drawn.prompt_tokens == len(drawn.prompt_ids)
    assert lm.generate("ROMEO:", max_new_tokens=5).seed is None, "greedy decoding has none"
    several = lm.generate(["a", "b"], n=2, temperature=1.0, max_new_tokens=2)
    assert all(second.seed == first.seed + 1 for first, second in several)
    assert several[0][0].seed != several[1][0].seed
    last = lm.generate("a", n=2, temperature=1.0, seed=2**64 - 1, max_new_tokens=2)
    assert [each.seed for each in last] == [2**64 - 1, 0]


def test_results_are_equal_and_hashable(lm):
    done = [lm.generate("ROMEO:", max_new_tokens=5, logprobs=2) for _ in range(2)]
    other = lm.generate("JULIET:", max_new_tokens=5, logprobs=2)
    assert done[0] == done[1] != other and len({*done, other}) == 2
    scores = [lm.score("To be"), lm.score("To be"), lm.score("or not")]
    assert scores[0] == scores[1] != scores[2] and len(set(scores)) == 2
    assert scores[0] != "To be" and scores[0] == Score(scores[0].tokens, scores[0].logprobs.copy())
    pieces = [list(lm.stream("ROMEO:", max_new_tokens=2, logprobs=1)) for _ in range(2)]
    assert len({*pieces[0], *pieces[0]}) == 2


def test_representations_say_what_a_thing_is(lm):
    assert repr(lm.model) == (
        "<GPT2 5.4M parameters, 6 layers of 256 channels and 4 heads, context 512, float32 on cpu>"
    )
    assert repr(lm.tokenizer) == "<Tokenizer of 2048 tokens, special <|endoftext|>>"


def test_a_bare_model_can_be_shown_and_scores_ids():
    """As nanoGPT's and llm.c's, which have neither a tokenizer nor a configuration of tokens."""
    reason = NoTokenizerError("the folder has no tokenizer", where="here", remedy="Pass ids.")
    model = GPT2.random(dataclasses.replace(TINY, bos_token_id=None, eos_token_id=None))
    with LanguageModel(model, NoTokenizer(reason), "bare") as bare:
        assert repr(bare.tokenizer) == "<NoTokenizer: the folder has no tokenizer>"
        assert bare.score([1, 2, 3], bos=False).tokens == [2, 3]
        with pytest.raises(InputError, match="bos=False"):
            bare.score([1, 2, 3])
        with pytest.raises(NoTokenizerError):
            bare.score("text", bos=False)


def test_an_array_of_texts_is_a_list_of_them(lm):
    texts = np.array(["To be", "ROMEO"])
    assert lm.generate(texts, max_new_tokens=2) == lm.generate(texts.tolist(), max_new_tokens=2)
    assert lm.generate(texts.astype(object), max_new_tokens=1)


def test_continuations_have_a_limit():
    with pytest.raises(InputError, match="from 1 to 16384"):
        SamplingParams(n=10**9)


def test_overloads_of_generate_are_typed():
    if not hasattr(typing, "get_overloads"):
        pytest.skip("typing.get_overloads is of Python 3.11")
    returns = [
        inspect.signature(o).return_annotation for o in typing.get_overloads(LanguageModel.generate)
    ]
    assert returns == ["Completion", "list[Completion]", "Any"]
    assert Completion.__module__ == "gpt2cupy.generation.text"


@pytest.mark.parametrize("given, kind", [(5, "an int"), ("text", "a str"), (None, "None")])
def test_what_cannot_be_decoded_is_named(lm, given, kind):
    with pytest.raises(InputError, match=f"to decode cannot be {kind}") as caught:
        lm.decode(given)
    assert caught.value.where == "decode" and "token ids" in caught.value.remedy
