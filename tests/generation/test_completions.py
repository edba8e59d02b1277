"""Bodies of completion requests in OpenAI's form, and the objects that answer them."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_lm import shakespeare_tokenizer

import gpt2cupy
from gpt2cupy.errors import DeviceError, InputError, NonFiniteError
from gpt2cupy.generation import completion_request as asked
from gpt2cupy.generation import completion_response as answered
from gpt2cupy.generation.text import Completion, PromptScore


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load(device="cpu") as lm:
        yield lm


def parsed(**body):
    return asked.completion_request({"prompt": "a", **body})


def test_every_field_arrives():
    body = {
        "model": "m", "max_tokens": 7, "min_tokens": 2, "temperature": 0.5, "top_p": 0.9,
        "top_k": 40, "min_p": 0.1, "n": 2, "stop": ["x", "y"], "seed": 3, "logprobs": 5,
        "repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.2,
        "logit_bias": {"5": -100}, "stop_token_ids": [9], "echo": True, "ignore_eos": True,
        "stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    found = parsed(**body)
    assert found.params == gpt2cupy.SamplingParams(
        max_new_tokens=7, min_new_tokens=2, temperature=0.5, top_p=0.9, top_k=40, min_p=0.1, n=2,
        stop=("x", "y"), seed=3, logprobs=5, repetition_penalty=1.1, presence_penalty=0.1,
        frequency_penalty=0.2, logit_bias={5: -100}, stop_token_ids=(9,), eos_token_id=-1,
    )  # fmt: skip
    assert (found.model, found.echo, found.stream) == ("m", True, True)
    assert found.include_usage and found.continuous_usage and found.scores_prompts
    assert found.prompts == ["a"] and found.ignored == ()


def test_defaults_are_those_of_openai():
    found = asked.completion_request({"prompt": None, "max_tokens": None, "user": "me", "stop": []})
    assert found.prompts == [""]
    assert (found.params.max_new_tokens, found.params.temperature, found.params.n) == (16, 1.0, 1)
    assert not found.echo and not found.stream and found.params.logprobs is None


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
        ("", [""]),
    ],
)
def test_prompts_of_every_form(prompt, prompts):
    assert asked.completion_request({"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"best_of": 2}, "best_of"),
        ({"suffix": "b"}, "suffix"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "7"}, "max_tokens"),
        ({"min_tokens": 1.5}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"stop": ""}, "stop"),
        ({"stop": [3]}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"seed": -(2**63) - 1}, "seed"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "b"}}, "logit_bias"),
        ({"logit_bias": [1]}, "logit_bias"),
        ({"echo": 1}, "echo"),
        ({"ignore_eos": "yes"}, "ignore_eos"),
        ({"stream": 0}, "stream"),
        ({"stream_options": []}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "include_usage"),
        ({"model": 3}, "model"),
    ],
)
def test_what_cannot_be_is_refused_by_its_name_in_the_body(body, field):
    with pytest.raises(InputError) as caught:
        parsed(**body)
    assert caught.value.where == field
    assert caught.value.remedy
    assert "new_tokens" not in str(caught.value)


@pytest.mark.parametrize("body", [None, [], "a", 3])
def test_a_body_is_an_object(body):
    with pytest.raises(InputError, match="the body of a request cannot be"):
        asked.completion_request(body)


def test_unknown_fields_are_named_and_left_out():
    assert parsed(zebra=1, use_beam_search=True, user="me").ignored == ("use_beam_search", "zebra")


def test_a_negative_seed_is_the_same_64_bits():
    assert parsed(seed=-1).params.seed == 2**64 - 1


def test_a_top_k_of_minus_one_is_off():
    assert parsed(top_k=-1).params.top_k == 0


def test_a_parser_remembers_settings_and_takes_each_prompt():
    parser = asked.CompletionParser()
    bodies = [{"prompt": str(i), "seed": i % 3, "zebra": 1} for i in range(200)]
    bodies += [{"prompt": [i], "seed": i} for i in range(200)]
    for body in bodies:
        assert parser.parse(body) == asked.completion_request(body)
    with pytest.raises(InputError, match="best_of"):
        parser.parse({"prompt": "a", "best_of": 1})
    with pytest.raises(InputError, match="cannot be a list"):
        parser.parse([])


# What json.loads may give.
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(sorted(asked._KNOWN)) | st.text(max_size=4), JSON))
def test_any_object_is_understood_or_refused(body):
    for parse in (asked.completion_request, asked.CompletionParser().parse):
        try:
            found = parse(body)
        except InputError as error:
            assert error.remedy and json.dumps(asked.error_object(error))
        else:
            assert len(found.prompts) >= 1


def test_requests_have_the_prompts_in_order(lm):
    found = parsed(prompt=["a", [1, 2]], n=2, seed=5, max_tokens=3).requests(lm._encoder)
    assert [request.key for request in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert found[2].prompt.tolist() == [1, 2]


def test_a_prompt_that_does_not_fit_is_refused_in_the_words_of_a_body(lm):
    with pytest.raises(InputError) as caught:
        parsed(max_tokens=100_000).requests(lm._encoder)
    assert "lower max_tokens" in str(caught.value) and caught.value.where == "prompt"
    with pytest.raises(InputError, match="outside the vocabulary"):
        parsed(prompt=[10**6]).requests(lm._encoder)


def test_errors_say_whose_they_are():
    caller = asked.error_object(InputError("bad", where="top_p", remedy="Do."))
    assert caller == {
        "message": "bad (top_p). Do.", "type": "invalid_request_error", "param": "top_p",
        "code": "invalid_request",
    }  # fmt: skip
    assert asked.error_object(DeviceError("x"))["type"] == "server_error"
    assert asked.error_object(NonFiniteError("x"))["code"] == "non_finite_logits"
    assert asked.error_object(ValueError("x"))["message"] == "ValueError: x"
    assert asked.error_object(InputError("x", where="prompt 3, 'a'"))["param"] == "prompt"
    assert (asked.status_of(InputError("x")), asked.status_of(DeviceError("x"))) == (400, 500)


def answer(lm, body, completions, **more):
    names = answered.TokenNames(lm.tokenizer)
    request = asked.completion_request(body)
    return answered.completion_response(
        names, request, completions, id_="cmpl-1", created=7, model="m", **more
    )


def generated(lm, body):
    """The completions of a body, one list."""
    request = asked.completion_request(body)
    return [c for p in request.prompts for c in _several(lm.generate(p, request.params))]


def _several(found):
    return found if isinstance(found, list) else [found]


def test_the_answer_has_a_choice_for_each_continuation(lm):
    body = {"prompt": ["ROMEO:", "JULIET:"], "n": 2, "max_tokens": 4, "seed": 1}
    made = generated(lm, body)
    found = answer(lm, body, made)
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in found["choices"]] == [each.text for each in made]
    assert found["choices"][0]["logprobs"] is None
    assert found["choices"][0]["finish_reason"] == "length"
    prompt_tokens = made[0].prompt_tokens + made[2].prompt_tokens
    assert found["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 16,
        "total_tokens": 16 + prompt_tokens,
    }
    assert {k: found[k] for k in ("id", "object", "created", "model")} == {
        "id": "cmpl-1", "object": "text_completion", "created": 7, "model": "m",
    }  # fmt: skip


def test_logprobs_name_tokens_and_where_they_begin(lm):
    body = {"prompt": "ROMEO:", "max_tokens": 6, "temperature": 0, "logprobs": 3}
    (made,) = generated(lm, body)
    (choice,) = answer(lm, body, [made])["choices"]
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == choice["text"]
    assert found["token_logprobs"] == made.logprobs
    assert [len(top) for top in found["top_logprobs"]] == [3] * 6
    assert all(max(top.values()) == top[name] for top, name in
               zip(found["top_logprobs"], found["tokens"], strict=True))  # fmt: skip
    for name, offset in zip(found["tokens"], found["text_offset"], strict=True):
        assert choice["text"][offset : offset + len(name)] == name


def test_echo_puts_the_prompt_and_its_tokens_first(lm):
    body = {"prompt": "ROMEO:", "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    (made,) = generated(lm, body)
    count = made.prompt_tokens - 1
    score = PromptScore([-1.0] * count, [[(5, -0.5)]] * count)
    (choice,) = answer(lm, body, [made], scores=[score])["choices"]
    found = choice["logprobs"]
    assert choice["text"] == "ROMEO:" + made.text
    assert found["tokens"] == [lm.tokenizer.decode([i]) for i in [*made.prompt_ids, *made.tokens]]
    assert found["token_logprobs"] == [None, *[-1.0] * count, *made.logprobs]
    assert found["top_logprobs"][0] is None and found["text_offset"][-1] == len("ROMEO:")
    ids = {**body, "prompt": made.prompt_ids}
    assert answer(lm, ids, [made], scores=[score])["choices"] == [choice]


def test_an_end_token_has_no_part_in_text_and_logprobs(lm):
    made = Completion("ab", [97, 98, 0], [-1.0, -2.0, -3.0], "eos", [1], [[], [], []])
    (choice,) = answer(lm, {"prompt": [1], "logprobs": 0}, [made])["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-1.0, -2.0]
    assert choice["finish_reason"] == "stop"


def test_tokens_past_a_stop_string_have_no_part_in_logprobs(lm):
    ids = lm.tokenizer.encode("one two. three")
    stop = next(i for i in range(len(ids)) if "." in lm.tokenizer.decode(ids[: i + 1]))
    made = Completion("one two", ids, [-1.0] * len(ids), "stop", [1], [[]] * len(ids))
    (choice,) = answer(lm, {"prompt": [1], "logprobs": 0, "stop": "."}, [made])["choices"]
    assert len(choice["logprobs"]["tokens"]) == len(
        [i for i in range(stop + 1) if len(lm.tokenizer.decode(ids[:i])) < len("one two")]
    )


@given(st.text(max_size=12))
def test_offsets_count_characters_also_where_tokens_are_parts_of_them(text):
    tokenizer = shakespeare_tokenizer()
    names = answered.TokenNames(tokenizer)
    ids = tokenizer.encode(text)
    found = answered.logprobs_object(names, ids, [0.0] * len(ids), [[]] * len(ids), 5)
    for index, offset in enumerate(found["text_offset"]):
        whole = tokenizer.stream()
        assert offset == 5 + len("".join(map(whole.push, ids[:index])))


def test_names_of_parts_of_characters_are_their_bytes(lm):
    ids = lm.tokenizer.encode("\u0416")
    names = answered.TokenNames(lm.tokenizer)
    shown = [names[id_] for id_ in ids]
    assert len(ids) > 1 and all(name.startswith("bytes:\\x") for name in shown)
    assert len(set(shown)) == len(ids)
    assert names[10**6] == "token_id:1000000"
    assert math.isclose(len(names), len(ids) + 1)
