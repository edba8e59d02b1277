"""tools/bisect_step.py names the op that is wrong."""

from __future__ import annotations

import importlib.util
import math
import sys

import numpy as np
import pytest
from builders import TINY, copied, model_on
from error_rule import DTYPES

from gpt2cupy import GPT2, GPT2Config, decode
from gpt2cupy.decode import Decoder, decoder, launched, ops_step
from gpt2cupy.errors import InputError
from gpt2cupy.record import ROOT
from gpt2cupy.validate import (
    Limit,
    random_ids,
)
from gpt2cupy.weights import Weights

GPT2_SHAPE = GPT2Config.from_name("gpt2")
LIMIT = Limit(1e-6, 1e-7, 1e-7)


def by(step, model):
    """An eager decoder whose step is another function."""
    return Decoder(model, step, launched, "broken")


def broken(model, other):
    """A decoder whose step is another model's, while the prompt is its own model's."""
    other.prepare_step(1)  # as its own decoder would
    return by(lambda model, state: ops_step(other, state), model)


def forgetful(model):
    """A decoder that loses the first key of one row."""

    def step(model, state):
        state.cache.k[1, 1, :, 0] = 0
        ops_step(model, state)

    return by(step, model)


@pytest.fixture(scope="module")
def bisect_step():
    spec = importlib.util.spec_from_file_location("bisect_step", ROOT / "tools" / "bisect_step.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["bisect_step"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["bisect_step"]


WRITES = {"qkv_b": "qkv", "proj_w": "x", "fc_w": "inner", "out_w": "x"}


@pytest.mark.parametrize("layer", range(TINY.n_layer))
@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("rows", [1, 3])
def test_bisecting_names_the_op_that_is_wrong(xp, bisect_step, name, layer, rows):
    weights = Weights.random(TINY, 0)
    changed = copied(TINY, weights)
    getattr(changed, name)[layer].reshape(-1)[5] += 1.0
    model, other = model_on(xp, TINY, weights), model_on(xp, TINY, changed)
    ids = random_ids(model, rows, 10)
    departure, count = bisect_step.bisect(
        lambda: decoder(model, "eager"), lambda: broken(model, other), ids
    )
    assert count == 1 + 5 * TINY.n_layer + 2
    op = departure.op
    place = {"qkv_b": 1, "proj_w": 3, "fc_w": 4, "out_w": 5}[name]
    assert (op.layer, op.writes, op.index) == (layer, WRITES[name], 5 * layer + place)
    assert set(departure.differences) == {WRITES[name]}
    assert f"layer {layer}" in str(op)


def test_bisecting_finds_attention_logits_and_embedding(bisect_step):
    model = GPT2(TINY, Weights.random(TINY, 0))
    ids = random_ids(model, 2, 10)

    def first(name, change):
        changed = GPT2(TINY, copied(TINY, model.weights))
        change(changed)
        found, _ = bisect_step.bisect(
            lambda: decoder(model, "eager"), lambda: broken(model, changed), ids
        )
        return found and (found.op.name, found.op.layer, found.op.writes)

    def scaled(other):
        other.config = GPT2Config(**{**vars(TINY), "scale_attn_weights": False})

    def normed(other):
        other.weights.lnf_b[0] += 1

    def placed(other):
        other.weights.wpe[9, 0] += 1

    assert first("scale", scaled) == ("attention_decode", 0, "attended")
    assert first("norm", normed) == ("norm_linear", None, "logits")
    assert first("position", placed) == ("embedding", None, "x")
    assert first("nothing", lambda other: None) is None


def test_bisecting_sees_a_wrong_choice_a_wrong_cache_and_other_ops(bisect_step):
    model = GPT2(TINY, Weights.random(TINY, 0))
    ids = random_ids(model, 2, 10)

    def stuck(model, state):
        before = state.steps.copy()
        ops_step(model, state)
        if state.steps.any():
            state.steps[...] = before

    def shorter(model, state):
        arrays = state.ids, state.positions, state.slots
        model.decode(*arrays, state.cache, state.work, state.logits)

    bench = bisect_step.Bench(lambda: decoder(model, "eager"), ids)
    first, again = bench.after(99)[0], bench.after(99)[0]
    for name, array in first.items():
        np.testing.assert_array_equal(array, again[name], name)
    assert first["steps"].tolist() == [1, 1]
    found, count = bisect_step.bisect(
        lambda: decoder(model, "eager"), lambda: by(stuck, model), ids
    )
    assert found.op.writes == "next token" and found.op.index == count - 1
    assert set(found.differences) == {"steps"}
    with pytest.raises(InputError, match="same ops"):
        bisect_step.bisect(lambda: decoder(model, "eager"), lambda: by(shorter, model), ids)
    found, _ = bisect_step.bisect(lambda: decoder(model, "eager"), lambda: forgetful(model), ids)
    assert found.op.writes == "the state" and set(found.differences) == {"k"}


def run_main(bisect_step, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", ["bisect_step.py", "--device", "cpu", *options])
    return bisect_step.main()


@pytest.mark.parametrize("options", [[], ["--path", "eager"], ["--gemv", "cublas"]])
def test_eager_is_not_compared_with_itself(bisect_step, monkeypatch, capsys, options):
    assert run_main(bisect_step, monkeypatch, *options) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("bisect_step: there is nothing to compare: both paths are eager")


@pytest.mark.parametrize("changed", [False, True])
def test_the_command_compares_another_path(bisect_step, monkeypatch, capsys, changed):
    def chosen(model, path):
        if path == "eager":
            return decoder(model, path)
        weights = copied(model.config, model.weights)
        weights.out_w[0] += changed
        return broken(model, GPT2(model.config, weights))

    monkeypatch.setattr(bisect_step.decode, "decoder", chosen)
    assert run_main(bisect_step, monkeypatch, "--position", "5") == changed
    said = "broken leaves eager at op 5: layer 0" if changed else "broken does not leave eager"
    assert capsys.readouterr().out.startswith(said)


def test_the_tolerance_of_bisecting(bisect_step):
    assert bisect_step.relative(np.array([1.0, 2.5]), np.array([1.0, 2.0])) == 0.25
    nan = np.array([np.nan, 1.0], np.float32)
    assert bisect_step.relative(nan, nan.copy()) == 0
    assert bisect_step.relative(nan, np.ones(2, np.float32)) == math.inf
    infinite = np.array([np.inf, 2.0])
    assert bisect_step.relative(np.array([np.inf, 1.0]), infinite) == 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_no_path_leaves_eager_in_any_op(bisect_step, dtype_name, rows):
    import cupy

    model = model_on(cupy, TINY, Weights.random(TINY, 0, DTYPES[dtype_name]))
    ids = random_ids(model, rows, 10)
    for path in decode.usable(model, rows):
        found, count = bisect_step.bisect(
            lambda: decoder(model, "eager"), lambda path=path: decode.decoder(model, path), ids
        )
        assert found is None and count == 1 + 5 * TINY.n_layer + 2
