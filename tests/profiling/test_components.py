"""Every op of a step has its place, and watching it changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import TINY
from pretended_gpu import PROMPT, SMALL

import gpt2cupy
from gpt2cupy import GPT2, ops, profile
from gpt2cupy import model as model_module
from gpt2cupy.errors import InputError
from gpt2cupy.profile import components
from gpt2cupy.profile.measure import Session


@pytest.mark.parametrize("tied", [True, False])
def test_every_op_of_a_step_has_its_place(tied):
    config = dataclasses.replace(TINY, tie_word_embeddings=tied)
    session = Session(GPT2.random(config, 0, device="cpu"), PROMPT, SMALL)
    block = [
        "ln_1",
        "attention/qkv product",
        "attention/attention over the cache",
        "attention/output product",
        "ln_2",
        "mlp/expansion + activation",
        "mlp/projection",
    ]
    inner = [f"blocks.{layer}/{part}" for layer in range(TINY.n_layer) for part in block]
    wanted = ["embeddings", *inner, "final norm", "lm_head", "sampling"]
    assert [op.label for op in session.ops] == wanted
    assert all(len(op.costs) == 1 and op.costs[0].bytes > 0 for op in session.ops)


def test_the_cost_of_attention_is_that_of_the_mean_step(model):
    session = Session(model, PROMPT, SMALL)
    mine = [op.costs[0] for op in session.ops if op.name == "attention_decode"]
    c, rows = TINY.n_embd, SMALL.batch
    # The steps find 3, 4, 5, 6 and 7 tokens in the cache.
    cache = np.mean([2 * rows * c * 4 * (before + 1) for before in (3, 4, 5, 6, 7)])
    assert mine[0].bytes == cache + rows * (4 * c * 4 + 8)


def test_observing_ends_with_its_block():
    with pytest.raises(ZeroDivisionError), components.observed(lambda *_: None):
        assert model_module.ops is not ops
        raise ZeroDivisionError
    assert model_module.ops is ops and gpt2cupy.decode.eager.ops is ops


def test_profiling_changes_no_token(model):
    session = Session(model, PROMPT, SMALL)
    session.unprofiled()
    tokens = [session.state.ids.copy(), session.state.positions.copy()]
    session.by_op()
    np.testing.assert_array_equal(tokens, [session.state.ids, session.state.positions])
    assert session.state.positions.tolist() == [len(PROMPT) + SMALL.tokens] * SMALL.batch


@pytest.mark.parametrize(
    "given_name, wanted",
    [
        ("qkv product", "qkv product"),
        ("qkv", "qkv product"),
        ("attention", "attention"),
        ("Softmax", "attention over the cache"),
        ("mask", "attention over the cache"),
        ("activation", "expansion + activation"),
        ("proj", "projection"),
        ("model", "model"),
        ("block", "block"),
        ("samp", "sampling"),
    ],
)
def test_names_of_components(given_name, wanted):
    assert profile.component(given_name) == wanted


@pytest.mark.parametrize("name", ["", "nothing", "ln", "bias"])
def test_an_unknown_component_names_the_others(name):
    with pytest.raises(InputError, match=r"unknown component.*--component.*lm_head"):
        profile.component(name)
