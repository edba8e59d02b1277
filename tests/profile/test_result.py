"""Tables, figures per token, and the step as kernels and gaps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import TINY
from hypothesis import given
from hypothesis import strategies as st
from pretended_gpu import PROMPT, SMALL

from gpt2cupy import profile
from gpt2cupy.errors import InputError
from gpt2cupy.profile import components, result
from gpt2cupy.profile.limits import Limits
from gpt2cupy.profile.measure import Settings
from gpt2cupy.profile.timeline import Timeline

LIMITS = Limits(1e9, 1e9, 1, 1)


def test_tables_add_up(found):
    tables = found.results["tables"]
    steps = SMALL.runs * SMALL.tokens
    for name, rows in tables.items():
        assert tuple(row["component"] for row in rows) == components.TABLES[name]
        assert sum(row["percent"] for row in rows) == pytest.approx(100)
        for row in rows:
            assert row["count"] == steps * (1 if name == "model" else TINY.n_layer)
            assert row["avg_ms"] * row["count"] == pytest.approx(row["total_ms"])
            assert row["total_ms"] > 0

    def total(name, *only):
        rows = tables[name]
        return sum(r["total_ms"] for r in rows if not only or r["component"] in only)

    assert total("block") == pytest.approx(total("model", "blocks"))
    assert total("attention") == pytest.approx(total("block", "attention"))
    assert total("mlp") == pytest.approx(total("block", "mlp"))
    kernel_total = sum(row["total_ms"] for row in found.results["kernels"])
    assert kernel_total == pytest.approx(found.timeline.busy.sum() / 1e3)
    assert kernel_total > total("model"), "sampling is a kernel, but no part of the model"


def test_figures_per_token(found, model):
    seconds = np.array([[0.001, 0.002, 0.003, 0.004, 0.01]])
    token = result.per_token(seconds, 2, found.ops, found.timeline)
    assert token["mean_ms"] == pytest.approx(4) and token["p50_ms"] == pytest.approx(3)
    assert token["p99_ms"] == pytest.approx(np.percentile(seconds, 99) * 1e3)
    assert token["tokens_per_s"] == pytest.approx(500)
    own = found.results["per_token"]
    assert own["p50_ms"] <= own["p95_ms"] <= own["p99_ms"]
    assert 0 < own["blocks_percent"] < 100


def test_a_component_has_its_kernels_only(model):
    mine = profile.profile(model, PROMPT, SMALL, component="attention").results["kernels"]
    assert {row["component"] for row in mine} == set(components.TABLES["attention"])
    assert sum(row["percent"] for row in mine) == pytest.approx(100)
    whole = profile.profile(model, PROMPT, SMALL, component="model").results["kernels"]
    assert "sampling" not in {row["component"] for row in whole}


def timeline(start, end, source="cupti", step_us=8.0):
    count = len(start[0])
    names = ["a", "b", "c"][:count]
    owner = [(0, part) for part in range(count)]
    return Timeline(np.array(start, float), np.array(end, float), owner, names, source, step_us)


def test_kernels_and_gaps_make_the_step():
    # Two runs of two steps; 3 us of kernels, 1 us of gap inside a step, 1 and 3 us to the next,
    # and a long pause between the runs that belongs to no step.
    start = [[0, 2], [5, 7], [1000, 1002], [1007, 1009]]
    end = [[1, 4], [6, 9], [1001, 1004], [1008, 1011]]
    row = result.step_equation(timeline(start, end), 2, unprofiled_us=8.0, host_us=5.0)
    assert (row["kernels_us"], row["overlap_us"], row["gaps_us"]) == (3.0, 0.0, 3.0)
    assert row["recording_us"] == 0 and row["residual_percent"] == pytest.approx(-25)
    text = result.equation_text(row)
    assert "kernels 3.0 us + gaps 3.0 us - recording 0.0 us = 6.0 us; unprofiled step 8" in text
    assert "residual -25.0 %" in text


def test_kernels_that_overlap_make_the_step_too():
    # A step of 10 us: a 0 to 4, b 2 to 7 while a still runs, then nothing until 10.
    starts = np.arange(4)[:, None] * 10.0
    begin, end = np.array([0, 2]), np.array([4, 7])
    seen = timeline(starts + begin, starts + end, step_us=11.0)
    row = result.step_equation(seen, 4, unprofiled_us=9.0, host_us=1.0)
    assert (row["kernels_us"], row["overlap_us"], row["gaps_us"]) == (9.0, 2.0, 3.0)
    # Recording made the same steps 2 us longer between events.
    assert row["recording_us"] == 2.0
    assert row["residual_percent"] == pytest.approx(100 * (10 - 2 - 9) / 9)
    assert "kernels 9.0 us - overlap 2.0 us + gaps 3.0 us - recording 2.0 us = 8.0 us" in (
        result.equation_text(row)
    )
    op = components.Op("any", ("lm_head",), None, [], [None, None])
    rows = {each["kernel"]: each for each in result.kernel_table([op], seen, LIMITS, 4)}
    assert (rows["a"]["step_us"], rows["b"]["step_us"]) == (7.0, 3.0)
    assert (rows["a"]["avg_us"], rows["b"]["avg_us"]) == (4.0, 5.0)


@given(st.data())
def test_whatever_overlaps_what_launches_add_is_the_step(data):
    runs, tokens, n = (data.draw(st.integers(1, most)) for most in (3, 5, 4))
    tokens += 1
    times = st.lists(st.floats(0, 50), min_size=tokens * n, max_size=tokens * n)
    shape = (runs * tokens, n)
    start = np.concatenate([np.cumsum(data.draw(times)) for _ in range(runs)]).reshape(shape)
    took = np.concatenate([data.draw(times) for _ in range(runs)]).reshape(shape)
    owner, names = [(0, part) for part in range(n)], ["k"] * n
    seen = Timeline(start, start + took, owner, names, "cupti", 1.0)
    parts = seen.parts(tokens)
    ends = np.maximum.accumulate((start + took).reshape(runs, -1), axis=1)[:, n - 1 :: n]
    steps = np.sort(np.diff(ends, axis=1).reshape(-1))
    quarter = len(steps) // 4
    whole = steps[quarter : len(steps) - quarter].mean()
    assert parts.added.sum(axis=1).mean() == pytest.approx(whole, abs=1e-6)
    assert (parts.gaps >= 0).all() and (parts.alone >= 0).all()
    assert (parts.alone <= parts.busy + 1e-9).all()
    row = result.step_equation(seen, tokens, unprofiled_us=1.0, host_us=1.0)
    made = row["kernels_us"] - row["overlap_us"] + row["gaps_us"]
    assert made == pytest.approx(whole, abs=1e-6)


def test_a_step_that_was_held_up_changes_nothing():
    starts = np.arange(8)[:, None] * 10.0
    starts[5:] += 900
    row = result.step_equation(timeline(starts, starts + 4), 8, unprofiled_us=10.0, host_us=1.0)
    assert (row["kernels_us"], row["gaps_us"]) == (4.0, 6.0)


def test_events_have_no_residual():
    seen = timeline([[0, 1], [3, 4]], [[1, 3], [4, 6]], "events")
    row = result.step_equation(seen, 2, unprofiled_us=5.0, host_us=5.0)
    assert (row["kernels_us"], row["gaps_us"], row["residual_percent"]) == (3.0, 2.0, None)
    assert "the gaps are the difference" in result.equation_text(row)


def test_rates_and_the_share_of_the_limit():
    op = components.Op("linear", ("lm_head",), None, [], [components.Cost(2000.0, 500.0)])
    seen = timeline([[0.0], [10.0]], [[4.0], [14.0]])
    (row,) = result.kernel_table([op], seen, LIMITS, 2)
    assert row["calls"] == 2 and row["avg_us"] == 4.0 and row["total_ms"] == 0.008
    assert row["gb_per_s"] == pytest.approx(0.5) and row["gflop_per_s"] == pytest.approx(0.125)
    assert row["percent_of_copy"] == pytest.approx(50)
    assert row["percent_of_product"] == pytest.approx(12.5)
    assert row["percent_of_limit"] == pytest.approx(50) and row["bound"] == "memory"


@pytest.mark.parametrize("name, value", [("runs", 0), ("tokens", 1), ("batch", 0), ("warmup", -1)])
def test_impossible_settings(name, value):
    with pytest.raises(InputError, match=f"--{name} is {value}"):
        Settings(**{name: value})


def test_a_context_that_is_too_short(model):
    with pytest.raises(InputError, match="exceed the context of 48"):
        profile.profile(model, np.zeros(44, np.int32), SMALL)
    profile.profile(model, np.zeros(43, np.int32), dataclasses.replace(SMALL, runs=1))


def test_a_norm_inside_a_product_has_no_row_but_is_covered():
    def op(*path, fused=()):
        return components.Op("any", path, 0, [lambda: None], [None], fused)

    inner = ("attention", "qkv product"), ("attention", "attention over the cache")
    ops = [op("blocks", *path, fused=("ln_1",) if path == inner[0] else ()) for path in inner]
    ops += [op("blocks", "mlp", "projection"), op("lm_head", fused=("final norm",))]
    owner = [(index, 0) for index in range(len(ops))]
    start = np.arange(len(ops), dtype=float)[None]
    seen = Timeline(start, start + 0.5, owner, ["k"] * len(ops), "cupti", 1.0)
    tables = result.component_tables(ops, seen, 1)
    covers = {row["component"]: row["covers"] for rows in tables.values() for row in rows}
    assert list(covers) == [
        *("blocks", "lm_head", "attention", "mlp"),
        *("qkv product", "attention over the cache", "projection"),
    ]
    assert covers["attention"] == "ln_1, attention" and covers["mlp"] == covers["blocks"] == ""
    assert covers["qkv product"] == "ln_1, product, bias"
    assert covers["lm_head"] == "final norm, lm_head"
    twice = Timeline(
        *(np.concatenate([t, t + 9]) for t in (start, start + 0.5)), owner, seen.names, "cupti", 1.0
    )
    mine = result.kernel_table(ops, twice, LIMITS, 2, "ln_1")
    assert [row["component"] for row in mine] == ["qkv product"]
