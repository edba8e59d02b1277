"""Tables, figures per token, and the step as kernels and gaps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from builders import TINY
from pretended_gpu import PROMPT, SMALL

from gpt2cupy import profile
from gpt2cupy.errors import InputError
from gpt2cupy.profile import components, counts, result
from gpt2cupy.profile.limits import Limits
from gpt2cupy.profile.measure import Settings, Timeline

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


def timeline(start, end, source="cupti"):
    count = len(start[0])
    names = ["a", "b", "c"][:count]
    owner = [(0, part) for part in range(count)]
    return Timeline(np.array(start, float), np.array(end, float), owner, names, source, 1.0)


def test_kernels_and_gaps_make_the_step():
    # Two runs of two steps; 3 us of kernels, 1 us of gap inside a step, 1 and 3 us to the next,
    # and a long pause between the runs that belongs to no step.
    start = [[0, 2], [5, 7], [1000, 1002], [1007, 1009]]
    end = [[1, 4], [6, 9], [1001, 1004], [1008, 1011]]
    row = result.step_equation(timeline(start, end), 2, unprofiled_us=8.0, host_us=5.0)
    assert (row["kernels_us"], row["gaps_us"]) == (3.0, 3.0)
    assert row["residual_percent"] == pytest.approx(-25)
    text = result.equation_text(row)
    assert "kernels 3.0 us + gaps 3.0 us = 6.0 us; unprofiled step 8.0 us" in text
    assert "residual -25.0 %" in text


def test_events_have_no_residual():
    seen = timeline([[0, 1], [3, 4]], [[1, 3], [4, 6]], "events")
    row = result.step_equation(seen, 2, unprofiled_us=5.0, host_us=5.0)
    assert (row["kernels_us"], row["gaps_us"], row["residual_percent"]) == (3.0, 2.0, None)
    assert "the gaps are the difference" in result.equation_text(row)


def test_rates_and_the_share_of_the_limit():
    op = components.Op("linear", ("lm_head",), None, [], [counts.Cost(2000.0, 500.0)])
    seen = timeline([[0.0], [10.0]], [[4.0], [14.0]])
    (row,) = result.kernel_table([op], seen, LIMITS)
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
    mine = result.kernel_table(ops, seen, LIMITS, "ln_1")
    assert [row["component"] for row in mine] == ["qkv product"]
