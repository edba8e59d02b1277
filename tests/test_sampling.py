"""SamplingParams refuses what is impossible and names the field."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re

import numpy as np
import pytest

from gpt2cupy import SamplingParams
from gpt2cupy.errors import InputError
from gpt2cupy.record import ROOT

NAN, INF = float("nan"), float("inf")

INVALID = {
    "max_new_tokens": (-1, 1.5, "4", True),
    "min_new_tokens": (-1, 1.5, False),
    "temperature": (-0.1, NAN, INF, None, "1"),
    "top_k": (-1, 2.0),
    "top_p": (0, -0.5, 1.01, NAN),
    "min_p": (-0.1, 1.1, NAN),
    "repetition_penalty": (0, -1.0, 1e-46, NAN, INF),
    "presence_penalty": (NAN, INF, "0"),
    "frequency_penalty": (NAN, -INF),
    "logit_bias": ({-1: 1.0}, {"1": 1.0}, {1: NAN}, {1: INF}, {1: None}, {True: 1.0}, 5),
    "seed": (-1, 2**64, 1.0, True),
    "stop": ("", ("",), (1,), ("a", None)),
    "eos_token_id": (-2, 1.5, "0", [1, -1], ["1"], {1: 2}),
    "stop_token_ids": (5, "5", [-1], [1.5], [True]),
    "n": (0, -1, 1.0, None),
    "logprobs": (-1, 21, 1.0, True),
    "speculate": ("yes", 1, True),
    "logits_processor": (3, "repr"),
}
VALID = {
    "max_new_tokens": (0, 1, None),
    "min_new_tokens": (0, 3, None),
    "temperature": (0, 0.0, 1e-3, 100),
    "top_k": (0, 1, 10**6, None),
    "top_p": (1e-9, 1, 1.0, None),
    "min_p": (0, 0.5, 1, None),
    "repetition_penalty": (0.1, 1, 2.0, None),
    "presence_penalty": (-2, 0, 2.0, None),
    "frequency_penalty": (-2, 0, 2.0, None),
    "logit_bias": ({}, {0: -100, 5: 1.5}, {3: -INF}, {np.int64(3): np.float32(1)}, None),
    "seed": (0, 2**64 - 1, None),
    "stop": ((), "a", ("a", "b"), ["a"], [np.str_("a")], None),
    "eos_token_id": (-1, 0, None, [3], (3, 4), np.array([3, 4]), {5, 6}),
    "stop_token_ids": ((), [3], (3, 4), np.array([3, 4]), None),
    "n": (1, 4),
    "logprobs": (0, 20, None),
    "speculate": ("ngram", None),
    "logits_processor": (repr, None),
}


def repr10(value):
    return type(value).__name__


def cases(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_every_field_is_covered():
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == set(INVALID) == set(VALID)


@pytest.mark.parametrize("name, value", cases(INVALID))
def test_invalid_values_name_the_field(name, value):
    with pytest.raises(InputError, match=f"^{name}=") as caught:
        SamplingParams(**{name: value})
    assert caught.value.where == "SamplingParams" and caught.value.remedy.startswith("It must be")


@pytest.mark.parametrize("name, value", cases(VALID))
def test_valid_values_pass(name, value):
    SamplingParams(**{name: value})


@pytest.mark.parametrize("least, most", [(1, 0), (5, 4), (201, 200)])
def test_more_tokens_at_least_than_at_most_names_both(least, most):
    with pytest.raises(InputError) as caught:
        SamplingParams(min_new_tokens=least, max_new_tokens=most)
    for name, value in (("min_new_tokens", least), ("max_new_tokens", most)):
        assert f"{name}={value}" in caught.value.what and name in caught.value.remedy
    SamplingParams(min_new_tokens=most, max_new_tokens=most)
    SamplingParams(min_new_tokens=least, max_new_tokens=None)


def test_a_limit_that_was_not_given_is_no_limit_for_what_must_come():
    params = SamplingParams(min_new_tokens=300)
    assert (params.limit(500), params.limit(310), params.must_fit) == (300, 300, 300)
    for copied in (params, copy.copy(params), pickle.loads(pickle.dumps(SamplingParams()))):
        assert dataclasses.replace(copied, seed=1).limit(50) == 50
    assert (SamplingParams().limit(500), SamplingParams(max_new_tokens=200).must_fit) == (200, 200)
    assert (SamplingParams(max_new_tokens=None).limit(500), SamplingParams().must_fit) == (500, 0)


@pytest.mark.parametrize(
    "options, remedy",
    [
        ({"top_k": 2.0}, "It must be an integer."),
        ({"seed": "1"}, "It must be an integer, or None."),
        ({"temperature": "1"}, "It must be a number."),
        ({"temperature": NAN}, "It must be finite."),
        ({"top_p": INF}, "It must be finite."),
        ({"top_k": -1}, "It must be 0 (off) or more."),
        ({"top_p": 1.5}, "It must be above 0 and at most 1 (off)."),
        ({"logit_bias": {1: INF}}, "It must be a mapping to finite numbers, or -inf to ban"),
    ],
    ids=str,
)
def test_the_remedy_fits_the_value(options, remedy):
    with pytest.raises(InputError) as caught:
        SamplingParams(**options)
    assert caught.value.remedy.startswith(remedy)


@pytest.mark.parametrize("value", [["x" * 500], "y" * 500, 10**5000, {1: "z" * 500}], ids=repr10)
def test_a_long_value_is_cut(value):
    with pytest.raises(InputError) as caught:
        SamplingParams(top_k=value)
    assert len(caught.value.what) < 110


@pytest.mark.parametrize("given, kept", [("a", ("a",)), (["a", "b"], ("a", "b")), ((), ())])
def test_stop_becomes_a_tuple(given, kept):
    assert SamplingParams(stop=given).stop == kept


def test_the_defaults_are_greedy():
    params = SamplingParams()
    assert params.temperature == 0 and not params.counts_tokens


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "repetition_penalty"])
def test_a_penalty_counts_tokens(name):
    assert SamplingParams(**{name: 1.5}).counts_tokens


@pytest.mark.parametrize(("given", "kept"), [(0.0, 0.0), (1e-39, 0.0), (1.2e-38, 1.2e-38)])
def test_a_temperature_whose_reciprocal_is_no_number_is_greedy(given, kept):
    row = SamplingParams(temperature=given).row(0, 4, -1)
    assert row["temperature"] == np.float32(kept)


def test_continuations_have_their_own_seeds():
    params = SamplingParams(seed=2**64 - 1, min_new_tokens=3, top_k=7)
    first, second = (params.row(index, 5, 9) for index in (0, 1))
    assert first["seed"] == 2**64 - 1 and second["seed"] == 0
    assert SamplingParams().row(0, 1, -1)["seed"] != SamplingParams().row(0, 1, -1)["seed"]


@pytest.mark.parametrize(
    "options",
    [
        {"logit_bias": [1]},
        {"stop": 5},
        {"temperature": 10**400},
        {"top_k": 2**31},
        {"min_new_tokens": 10**12},
        {"repetition_penalty": 1e39},
        {"logit_bias": {5: 1e300}},
    ],
    ids=str,
)
def test_what_no_kernel_could_take_is_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        SamplingParams(**options)


def test_numpy_scalars_are_numbers():
    params = SamplingParams(top_k=np.int64(5), temperature=np.float32(0.5))
    assert params.top_k == 5 and params.temperature == 0.5


def test_the_page_has_every_field_in_order_with_its_default():
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", text, re.MULTILINE)
    shown = {"None": "`None`", "()": "none", "{}": "none"}
    values = {name: str(value) for name, value in vars(SamplingParams()).items()}
    assert rows == [
        (name, shown.get(value, value.removesuffix(".0"))) for name, value in values.items()
    ]
