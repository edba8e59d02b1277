"""generation_config.json: its ends always, its settings on request, and a warning for the rest."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from builders import small_bpe, write_bpe, write_checkpoint
from command import call, done

import gpt2cupy
from gpt2cupy import GPT2Config
from gpt2cupy.checkpoint.resolve import _WANTED
from gpt2cupy.errors import ConfigError
from gpt2cupy.generation.generation_config import GenerationConfig

CONFIG = GPT2Config(vocab_size=263, n_positions=64, n_embd=32, n_layer=1, n_head=2)
END = 262  # of the tokenizer
INF = math.inf
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    write_bpe(path, *small_bpe())
    write_checkpoint(path, CONFIG)
    return path


@pytest.fixture
def load(folder):
    """Loads the checkpoint with these files; None is no file."""
    opened = []

    def make(generation=None, config=None, **options):
        file = folder / "generation_config.json"
        file.unlink(missing_ok=True)
        if generation is not None:
            file.write_text(generation if isinstance(generation, str) else json.dumps(generation))
        fields = {**CONFIG.to_dict(), "bos_token_id": None, "eos_token_id": None, **(config or {})}
        (folder / "config.json").write_text(json.dumps(fields))
        opened.append(gpt2cupy.load(str(folder), **{"device": "cpu"} | options))
        return opened[-1]

    yield make
    for lm in opened:
        lm.close()


def forced(*tokens):
    """Options under which these tokens come, one after the other."""
    bias = {token: 1e6 - 1e3 * place for place, token in enumerate(tokens)}
    return {"logit_bias": bias, "presence_penalty": 5e5}


# -- beginnings and ends -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "generation, config, bos, ends",
    [
        (None, {}, END, (END,)),
        (None, {"bos_token_id": 3, "eos_token_id": 4}, 3, (4,)),
        (None, {"eos_token_id": [4, 5]}, END, (4, 5)),
        ({"bos_token_id": 1, "eos_token_id": [2, 7]}, {"eos_token_id": 4}, 1, (2, 7)),
        ({"eos_token_id": 2}, {"bos_token_id": 3, "eos_token_id": 4}, 3, (2,)),
        ({}, {"bos_token_id": 3, "eos_token_id": 4}, 3, (4,)),
        # What the model can never produce ends nothing.
        ({"bos_token_id": 50256, "eos_token_id": 50256}, {}, END, (END,)),
        ({"eos_token_id": [50256, 9]}, {}, END, (9,)),
    ],
)
def test_where_files_disagree(load, generation, config, bos, ends):
    lm = load(generation, config)
    assert (lm.bos_token_id, lm.eos_token_ids) == (bos, ends)
    assert lm.encode("").tolist() == [bos]
    assert lm.generate("", max_new_tokens=3) == lm.generate([bos], max_new_tokens=3)
    np.testing.assert_array_equal(
        lm.score("he a").logprobs, lm.score([bos, *lm.encode("he a")], bos=False).logprobs
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("end", [30, 40])
def test_each_of_several_ends(load, end, device):
    lm = load({"eos_token_id": [30, 40]}, device=device)
    for found in (lm.generate("a", **forced(50, end, 51)), *lm.generate(["a"], **forced(50, end))):
        assert (found.tokens, found.finish_reason) == ([50, end], "eos")
        assert found.text == lm.decode([50])
    assert [p.finish_reason for p in lm.stream("a", **forced(50, end, 51))] == [None, "eos"]
    other = lm.generate("a", eos_token_id=[50, 51], **forced(30, 51, 40))
    assert (other.tokens, other.finish_reason) == ([30, 51], "eos")
    stopped = lm.generate("a", stop_token_ids=[51], **forced(50, 51))
    assert (stopped.tokens, stopped.finish_reason) == ([50, 51], "stop")
    assert stopped.text == lm.decode([50])


@pytest.mark.parametrize("least", [1, 3])
@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_no_end_comes_before_min_new_tokens(load, least, slots, device):
    """Nor a stop token: the kernel knows one end, the others are banned by bias until then."""
    lm = load({"eos_token_id": [30, 40]}, device=device)
    wanted = {"logit_bias": {30: 1e6, 40: 2e6, 41: 3e6}, "stop_token_ids": [41]}
    options = {"min_new_tokens": least, "max_new_tokens": 6, **wanted}
    for found in lm.generate(["a", "he", "the"][:slots], **options):
        assert (len(found.tokens), found.tokens[-1]) == (least + 1, 41)
        assert not {30, 40, 41} & set(found.tokens[:-1])
    assert lm.generate("a", max_new_tokens=2, **wanted).tokens == [41]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1.5]}', '{"bos_token_id": {}}']
)
def test_a_broken_file_is_refused(load, text):
    with pytest.raises(ConfigError) as caught:
        load(text)
    assert caught.value.where.endswith("generation_config.json") and caught.value.remedy


def test_the_hub_is_asked_for_it():
    assert "generation_config.json" in _WANTED


# -- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields, settings, lacking",
    [
        ({"temperature": 0.7, "top_k": 5}, {}, ()),  # as transformers: greedy without do_sample
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50}, ()),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": None},
            {"temperature": 0.7, "top_k": 5, "top_p": 0.9},
            (),
        ),
        (
            {"repetition_penalty": 1.2, "max_new_tokens": 5, "min_new_tokens": 2},
            {"repetition_penalty": 1.2, "max_new_tokens": 5, "min_new_tokens": 2},
            (),
        ),
        ({"stop_strings": ["x"]}, {"stop": ["x"]}, ()),
        (
            {"suppress_tokens": [3, 999], "bad_words_ids": [[4], [5, 6]]},
            {"logit_bias": {3: -INF, 4: -INF}},
            ("bad_words_ids of several tokens",),
        ),
        (
            {"num_beams": 4, "no_repeat_ngram_size": 3},
            {},
            ("num_beams=4", "no_repeat_ngram_size=3"),
        ),
        ({"num_beams": 1, "typical_p": 1.0, "max_length": 20, "guidance_scale": None}, {}, ()),
        ({"max_length": 50, "a_new_key": "x"}, {}, ("max_length=50", "a_new_key='x'")),
        (
            {"_from_model_config": True, "transformers_version": "5", "pad_token_id": 3}
            | {"use_cache": True, "output_scores": True},
            {},
            (),
        ),
    ],
)
def test_what_becomes_of_fields(fields, settings, lacking):
    found = GenerationConfig.from_dict(fields, CONFIG)
    assert (found.settings, found.lacking) == (settings, lacking)


def test_settings_are_taken_on_request(load):
    fields = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_new_tokens": 7}
    lm = load(fields)
    plain = lm.generate("he", max_new_tokens=7)
    assert len(lm.generate("he").tokens) != 7 and plain.seed is None
    expected = lm.generate("he", temperature=0.7, top_k=5, seed=3, max_new_tokens=7)
    assert lm.generate("he", generation_config=True, seed=3) == expected
    assert "".join(p.text for p in lm.stream("he", generation_config=True, seed=3)) == expected.text
    always = load(fields, generation_config=True)
    assert always.generate("he", seed=3) == expected
    assert always.generate("he", temperature=0.0, top_k=0) == plain
    assert always.generate("he", gpt2cupy.SamplingParams(max_new_tokens=7)) == plain
    assert always.generate("he", generation_config=False, max_new_tokens=7) == plain
    banned = plain.tokens[0]
    other = load({"suppress_tokens": [banned]}, generation_config=True).generate("he")
    assert banned not in other.tokens


def test_what_is_lacking_is_a_warning(load):
    lm = load({"num_beams": 4, "eos_token_id": 5})
    lm.generate("he", max_new_tokens=2)
    with pytest.warns(
        RuntimeWarning, match=r"left out: num_beams=4 .*generation_config.json"
    ) as seen:
        lm.generate("he", max_new_tokens=2, generation_config=True)
    assert seen[0].filename == __file__


def test_a_setting_that_cannot_be_names_the_file(load):
    lm = load({"repetition_penalty": "high"})
    with pytest.raises(ConfigError, match=r"repetition_penalty='high'.*generation_config.json"):
        lm.generate("he", generation_config=True)
    lm.generate("he", max_new_tokens=1)


@pytest.mark.filterwarnings("default:not supported")
def test_the_command_says_what_it_takes(load, folder):
    load({"repetition_penalty": 1.5, "suppress_tokens": [3], "num_beams": 4})
    flags = ("generate", "he", "--model", str(folder), "--device", "cpu", "--max-new-tokens", "4")
    code, out, err = call(*flags)
    asked = "generation_config.json: repetition_penalty=1.5, logit_bias=1 banned"
    assert code == 0 and f"{asked}, not taken without --generation-config\n" in err
    code, other, err = call(*flags, "--generation-config")
    assert code == 0 and f"{asked}\n" in err and "left out: num_beams=4" in err
    assert (
        out != other == done(*flags, "--repetition-penalty", "1.5", "--logit-bias", "3=-inf", "-q")
    )
