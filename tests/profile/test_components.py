"""Every op of a step has its place, and watching it changes nothing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import TINY
from pretended_gpu import PROMPT, SMALL

from gpt2cupy import GPT2, ops, profile
from gpt2cupy.decode import Decoder, launched, persistent, persistent_step
from gpt2cupy.decode.step import sample_next
from gpt2cupy.errors import InputError
from gpt2cupy.ops.core import registry
from gpt2cupy.profile import components, result
from gpt2cupy.profile.limits import Limits
from gpt2cupy.profile.measure import Session
from gpt2cupy.profile.timeline import Timeline


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


def test_profiling_changes_no_value():
    model = GPT2.random(TINY, 0, device="cpu")
    rng = np.random.default_rng(0)
    for name, array in model.weights.items():
        if name.endswith("_b"):
            array[...] = rng.standard_normal(array.shape)
    session = Session(model, PROMPT, SMALL)
    session.unprofiled()
    state = session.state
    wanted = [array.copy() for array in (state.ids, state.positions, state.logits)]
    session.by_op()
    for before, after in zip(wanted, (state.ids, state.positions, state.logits), strict=True):
        np.testing.assert_array_equal(before, after)
    assert state.positions.tolist() == [len(PROMPT) + SMALL.tokens] * SMALL.batch


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


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_norm_and_its_product_are_as_many_ops_as_kernels_make_them(model, count):
    # One kernel for both; a norm and a product; a norm, the library's product and its epilogue.
    session = Session(model, PROMPT, SMALL)
    places = components._Places(model, session.state)
    w, work = model.layers[1], session.state.work
    args = work.x, w["ln2_w"], w["ln2_b"], 1e-5, w["fc_w"], w["fc_b"]
    options = {"activation": "relu", "h": work.h, "out": work.inner, "backend": "ours"}
    launches = [object() for _ in range(count)]
    found = components._norm_linear(places, args, options, launches)
    assert [launch for op in found for launch in op.launches] == launches
    assert all(len(op.launches) == len(op.costs) for op in found)
    product = found[-1]
    assert product.label == "blocks.1/mlp/expansion + activation"
    if count == 1:
        assert len(found) == 1 and product.fused == ("ln_2",)
        assert product.touches("ln_2") and not product.within("ln_2")
        whole = product.costs[0]
        apart = components._norm_linear(places, args, options, [object()] * 2)
        # Apart, the normed rows are written and read once more.
        bytes_apart = sum(op.costs[0].bytes for op in apart)
        assert bytes_apart == whole.bytes + 2 * work.h.nbytes
        assert sum(op.costs[0].flops for op in apart) == whole.flops
    else:
        assert found[0].label == "blocks.1/ln_2" and not product.fused
        assert found[0].costs[0].bytes > 0 and all(cost.bytes > 0 for cost in product.costs)


def test_a_kernel_that_fuses_a_block_needs_entries_and_nothing_else(model, monkeypatch):
    """A row of the table, its place with the rows that it makes, what it covers, its cost."""
    rows = ("qkv product", "attention over the cache", "output product")
    place = ("blocks", "attention", "attention block"), ("ln_1", *rows)
    attention = (*components.TABLES["attention"], "attention block")
    monkeypatch.setitem(components.TABLES, "attention", attention)
    monkeypatch.setitem(components.OPS, "attention_block", place)
    monkeypatch.setitem(components.COVERS, "attention block", rows)
    cost = components.Cost(1000.0, 10.0)

    @registry.op(reference=None, cost=lambda: cost)
    def attention_block(x, ln_w, ln_b, eps, qkv_w, qkv_b, *rest):
        return x

    monkeypatch.setattr(ops, "attention_block", attention_block, raising=False)

    def fused_step(model, state):
        for w in model.layers:
            args = w["ln1_w"], w["ln1_b"], 1e-5, w["qkv_w"], w["qkv_b"]
            ops.attention_block(state.work.x, *args)
        sample_next(state, state.logits, state.rows)

    fused = Decoder(model, fused_step, launched, "fused")

    session = Session(model, PROMPT, SMALL)
    found = components.ops_of_step(fused, session.state, 4.0)
    labels = [f"blocks.{n}/attention/attention block" for n in range(TINY.n_layer)]
    assert [op.label for op in found] == [*labels, "sampling"]
    assert found[0].costs == [cost] and found[0].touches("qkv product")
    start = np.arange(2.0 * len(found)).reshape(2, -1)
    owner = [(index, 0) for index in range(len(found))]
    seen = Timeline(start, start + 0.5, owner, [op.name for op in found], "cupti", 1.0)
    tables = result.component_tables(found, seen, TINY.n_layer)
    assert [row["component"] for row in tables["attention"]] == ["attention block"]
    covers = {row["component"]: row["covers"] for rows in tables.values() for row in rows}
    assert covers["attention block"] == f"ln_1, {', '.join(rows)}"
    assert covers["attention"] == "ln_1, attention" and tables["mlp"] == []
    kernels = result.kernel_table(found, seen, Limits(1e9, 1e9, 1, 1), 2, "output product")
    assert [row["kernel"] for row in kernels] == ["attention_block"]
    assert kernels[0]["bytes"] == 1000


def test_a_persistent_step_is_one_op_of_everything(monkeypatch, model):
    """Its bytes are those of the arrays: weights once, the past, a row of either embedding."""
    monkeypatch.setattr(persistent, "check", lambda *_: None)
    monkeypatch.setattr(persistent.step, "blocks", lambda channels: 1)
    monkeypatch.setattr(persistent.step, "DECODE_STEP", {SMALL.batch: None})
    monkeypatch.setattr(persistent.step, "launch", lambda *_, **options: None)
    session = Session(model, PROMPT, SMALL)
    state, w = session.state, model.weights
    decoder = Decoder(model, persistent_step, launched, "persistent")
    whole, sampling = components.ops_of_step(decoder, state, 6.0)
    assert (whole.label, sampling.label) == ("blocks", "sampling")
    assert all(whole.touches(name) for name in components.NAMES)
    (cost,) = whole.costs
    channels = TINY.n_embd
    layers = w.nbytes - w.wte.nbytes - w.wpe.nbytes
    past = (state.cache.k[:, :, :, 0].nbytes + state.cache.v[:, :, :, 0].nbytes) * 7
    rows = 2 * state.batch * channels * w.wte.itemsize
    small = state.ids.nbytes + state.positions.nbytes + state.slots.nbytes + state.logits.nbytes
    padding = w.nbytes - sum(array.nbytes for _, array in w.items())
    assert cost.bytes == layers - padding + w.lm_head.nbytes + past + rows + small
    each = sum(getattr(w, name)[0].size for name in ("qkv_w", "proj_w", "fc_w", "out_w"))
    attended = 4 * TINY.n_layer * state.batch * channels * 7
    products = 2 * state.batch * (TINY.n_layer * each + w.lm_head.size)
    assert cost.flops == products + attended


def test_an_op_without_a_place_is_named(model):
    session = Session(model, PROMPT, SMALL)
    places = components._Places(model, session.state)
    with pytest.raises(LookupError, match=r"ops\.rotate reads no weight"):
        places("rotate", (np.zeros(2),))
