"""Events and CUPTI, on a GPU that only pretends, and on a real one where there is one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from builders import TINY
from pretended_gpu import PROMPT, SMALL, STEP, PretendedSession, held

from gpt2cupy import GPT2, profile
from gpt2cupy.errors import DeviceError
from gpt2cupy.profile import events
from gpt2cupy.profile.measure import Session


def test_events_time_the_launches(gpu, model):
    found = profile.profile(model, PROMPT, SMALL, cupti=False)
    results = found.results
    assert results["component_timer"] == results["kernel_timer"] == "events"
    assert "--no-cupti" in results["note"] and found.error is None
    # Gap and kernel, without what an event costs; the library's launch makes two kernels.
    busy = found.timeline.busy
    assert busy.shape == (SMALL.runs * SMALL.tokens, STEP)
    library = [name for name, _ in enumerate(found.ops) if found.ops[name].path == ("lm_head",)]
    np.testing.assert_allclose(busy[:, library], 8, rtol=1e-6)
    np.testing.assert_allclose(np.delete(busy, library, axis=1), 4, rtol=1e-6)
    # The runs that are measured, and no others, are what nsys captures.
    assert gpu.capturing == ["start", "stop"]
    assert results["tables"]["block"][0]["launches"] == 1


def test_cupti_times_the_kernels(cupti, model):
    found = profile.profile(model, PROMPT, SMALL)
    results = found.results
    assert found.error is None and results["note"] == "" and results["kernel_timer"] == "cupti"
    np.testing.assert_allclose(found.timeline.busy, 3)
    rows = {row["kernel"]: row for row in results["kernels"]}
    steps = SMALL.runs * SMALL.tokens
    assert rows["library"]["calls"] == rows["library_reduce"]["calls"] == steps
    assert "bytes" in rows["library"] and "bytes" not in rows["library_reduce"]
    assert sum(row["calls"] for row in results["kernels"]) == steps * (STEP + 1)
    # 3 us of every kernel and 1.25 us before it, of which recording is 0.25; an event after each
    # step.
    gaps, launches = results["gaps"], STEP + 1
    assert gaps["kernels_us"] == 3 * launches and gaps["overlap_us"] == 0
    assert gaps["gaps_us"] == pytest.approx(1.25 * launches + 0.5)
    assert gaps["recording_us"] == pytest.approx(0.25 * launches)
    assert gaps["unprofiled_us"] == pytest.approx(4 * launches + 0.5)
    assert gaps["residual_percent"] == pytest.approx(0, abs=1e-9)
    costs = results["overhead"]["kernels_percent"]
    assert costs == pytest.approx(100 * gaps["recording_us"] / gaps["unprofiled_us"])
    assert rows["library"]["call"] == {"median_us": 3, "p10_us": 3, "p90_us": 3, "runs": steps}
    assert results["per_token"]["step"]["median_us"] == pytest.approx(gaps["unprofiled_us"])
    # What the kernels add to a step makes the recorded one.
    step = sum(row["step_us"] for row in results["kernels"])
    assert step == pytest.approx(gaps["kernels_us"] + gaps["gaps_us"])
    assert cupti.log == ["enable", "disable", "finalize"]


def test_a_host_whose_speed_varies_leaves_no_residual(cupti, model, monkeypatch):
    """The records have to account for the steps that they are of, not for others' times."""
    speeds, begin = itertools.cycle([0.25, 5.0, 2.0]), PretendedSession.begin

    def at_another_speed(session):
        session.gpu.recording_us = next(speeds)
        begin(session)

    monkeypatch.setattr(PretendedSession, "begin", at_another_speed)
    gaps = profile.profile(model, PROMPT, SMALL).results["gaps"]
    assert gaps["recording_us"] > 0
    assert gaps["residual_percent"] == pytest.approx(0, abs=1e-9)


def test_a_run_with_lost_records_is_dropped(cupti, model):
    cupti.lose = 1
    found = profile.profile(model, PROMPT, SMALL)
    assert "1 runs were dropped" in found.results["note"]
    assert len(found.timeline.busy) == (SMALL.runs - 1) * SMALL.tokens


@pytest.mark.parametrize("how", ["refused", "silent", "lossy", "late"])
def test_a_held_cupti_keeps_what_was_measured(cupti, model, how):
    if how == "refused":
        cupti.activity_enable = held
    elif how == "silent":
        cupti.activity_flush_all = lambda flag: None
    elif how == "lossy":
        cupti.lose = SMALL.runs
    else:
        cupti.activity_flush_all = held
    found = profile.profile(model, PROMPT, SMALL)
    assert isinstance(found.error, DeviceError) and "Only one tool may hold it" in str(found.error)
    assert found.results["kernel_timer"] == "events"
    assert found.results["tables"]["model"][0]["total_ms"] > 0


def test_without_cupti_python_events_are_used(gpu, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupti", None)
    found = profile.profile(model, PROMPT, SMALL)
    assert found.error is None and found.results["kernel_timer"] == "events"
    assert "install gpt2cupy[profile]" in found.results["note"]


def test_ranges_have_the_names_of_the_tables(gpu, model, monkeypatch):
    seen = []

    def annotate(name, domain):
        assert domain == "gpt2cupy"
        return seen.append(name) or contextlib.nullcontext()

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    profile.profile(model, PROMPT, SMALL, cupti=False)
    steps = (SMALL.runs + 1) * SMALL.tokens  # one run op by op is for warming up
    assert seen.count("blocks.1/attention/qkv product") == seen.count("lm_head") == steps
    assert seen.count("run") == seen.count("run, op by op") == SMALL.runs


def test_a_gate_holds_until_everything_is_queued(monkeypatch):
    monkeypatch.setattr(events, "GATE_SECONDS", 60)
    queue = []
    stream = SimpleNamespace(launch_host_func=lambda callback, arg: queue.append((callback, arg)))
    with events.gate(stream):
        ((callback, argument),) = queue
        waiting = threading.Thread(target=callback, args=(argument,))
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
    waiting.join(30)
    assert not waiting.is_alive()


def test_launches_have_names():
    kernel = SimpleNamespace(name="gemv")
    assert events.launch_name(SimpleNamespace(function=kernel)) == "gemv"
    assert events.launch_name(lambda: None) == "cuBLAS"


PLACES = {"embeddings", "qkv product", "attention over the cache", "projection", "lm_head"}


@pytest.mark.gpu
@pytest.mark.parametrize("gemv", ["ours", "cublas"])
@pytest.mark.parametrize("dtype, batch", [("float32", 1), ("float16", 1), ("float16", 3)])
def test_every_launch_of_a_step_has_its_place(dtype, batch, gemv):
    settings = dataclasses.replace(SMALL, batch=batch)
    model = GPT2.random(TINY, 0, dtype=dtype, device="cuda")
    model.gemv = gemv
    session = Session(model, PROMPT, settings)
    assert all(len(op.launches) == len(op.costs) > 0 for op in session.ops)
    per_layer = [sum(op.layer == layer for op in session.ops) for layer in range(TINY.n_layer)]
    # Five where norms are made inside products, else seven.
    assert set(per_layer) == {5 if any(op.fused for op in session.ops) else 7}


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["eager", "graph"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_profile_on_a_gpu(batch, decode):
    settings = dataclasses.replace(SMALL, batch=batch, decode=decode)
    model = GPT2.random(TINY, 0, dtype="float16", device="cuda")
    found = profile.profile(model, PROMPT, settings, cupti=False)
    assert {row["component"] for row in found.results["kernels"]} >= PLACES
    assert found.results["decoder"] == decode
    assert (found.timeline.busy >= 0).all() and found.timeline.busy.sum() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["eager", "graph"])
def test_cupti_sees_the_kernels(decode):
    pytest.importorskip("cupti")
    model = GPT2.random(TINY, 0, dtype="float16", device="cuda")
    settings = dataclasses.replace(SMALL, decode=decode)
    # It lets go each time: a second profile works.
    for _ in range(2):
        found = profile.profile(model, PROMPT, settings)
        assert found.error is None, found.error
        assert found.results["kernel_timer"] == "cupti"
        assert {row["component"] for row in found.results["kernels"]} >= PLACES
