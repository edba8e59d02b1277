"""The benchmarks run at a tiny size without a GPU, and what they count is right."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from bench_runs import RUNS, bench
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy import GPT2Config, load, ops
from gpt2cupy.cache import KVCache
from gpt2cupy.decode import graph
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.record import ROOT
from gpt2cupy.timing import Timing
from gpt2cupy.weights import RESIDUAL_BIASES, Weights

sys.path.insert(0, str(ROOT / "bench"))
import ablation
import arguments
import decode
import naive
import prefill
import shared
import soak
import validation

from bench.report import tables, validate_tables


def widths(text: str) -> set[int]:
    return {line.count("|") for line in text.splitlines() if line.startswith("|")}


@pytest.mark.parametrize("script", RUNS)
def test_every_benchmark_runs_without_a_gpu(script, tmp_path):
    out = tmp_path / "record.json"
    options = RUNS[script].split()
    done = bench(script, "--model", "tiny", "--device", "cpu", "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    entry = json.loads(out.read_text())
    assert "gpu" not in entry["environment"] and f"{script}.py" in entry["command"]
    assert entry["complete"] is True
    for row in entry["results"].get("rows", []):
        row["model"] = "124M"  # what the tables of the documents show
    sources = {script, "decode-sizes"} if script == "decode" else {script}
    made = [make(entry) for source, make in tables.TABLES.values() if source in sources]
    assert len(made) >= len(sources) and all(len(widths(text)) == 1 for text in made)


ON_EVERY_GPU = ["decode", "batches", "prefill", "ablation", "gemv", "invariance"]


@pytest.mark.gpu
@pytest.mark.parametrize("script", ON_EVERY_GPU)
def test_every_benchmark_runs_on_a_gpu(script, tmp_path):
    out = tmp_path / "record.json"
    options = RUNS.get(script, "--runs 2").replace("--dtype float32", "").split()
    done = bench(script, "--model", "tiny", "--dtype", "float16", *options, "--out", str(out))
    assert done.returncode == 0, done.stderr
    entry = json.loads(out.read_text())
    assert "gpu" in entry["environment"] and entry["results"]["rows"]
    for row in entry["results"]["rows"]:
        row["model"] = "124M"
    assert tables.TABLES[script][1](entry)


def test_contexts_reach_as_far_as_the_steps_do(monkeypatch):
    reached, decode_rows = [], shared.GPT2.decode

    def watched(self, ids, positions, *rest, **options):
        reached.append(int(positions.max()))
        return decode_rows(self, ids, positions, *rest, **options)

    monkeypatch.setattr(shared.GPT2, "decode", watched)
    model = shared.random_model(shared.TINY, "float32", "cpu")
    longest = max(c for c in range(1, 129) if decode.reach(c) <= shared.TINY.n_positions)
    assert longest == 125
    for context in (1, longest):
        reached.clear()
        assert decode.measure_step(model, "eager", 1, context, 1)["context"] == context
        assert max(reached) < decode.reach(context)
    assert max(reached) == shared.TINY.n_positions - 1


@pytest.mark.parametrize("engines, complete", [({}, False), ({"one": {}}, True)])
def test_a_record_without_an_engine_is_not_complete(tmp_path, engines, complete):
    out = tmp_path / "record.json"
    says = pytest.raises(Gpt2CupyError, match="no engine ran in 1 of 2 rows")
    with contextlib.nullcontext() if complete else says, shared.Kept(out, {}, gpu=False) as kept:
        kept.rows += [{"engines": {"one": {}}}, {"engines": engines}]
    assert json.loads(out.read_text())["complete"] is complete


def test_what_was_measured_is_kept_when_the_rest_fails(tmp_path, monkeypatch):
    out = tmp_path / "record.json"
    options = ["--device", "cpu", "--out", str(out), "--dtype", "float32", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["prefill.py", "--model", "tiny", "--tokens", "4,5", *options])
    measure = prefill.measure

    def measure_first(model, tokens, runs):
        if tokens == 5:
            raise Gpt2CupyError("the rest failed")
        return measure(model, tokens, runs)

    monkeypatch.setattr(prefill, "measure", measure_first)
    with pytest.raises(SystemExit, match="the rest failed"):
        arguments.main(prefill.run)
    kept = json.loads(out.read_text())
    assert [row["tokens"] for row in kept["results"]["rows"]] == [4]
    assert kept["complete"] is False


def test_validation_becomes_a_record(tmp_path):
    out = tmp_path / "record.json"
    options = ["--model", "tiny", "--device", "cpu", "--steps", "9", "--out", str(out)]
    done = bench("validation", *options)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr
    entry = json.loads(out.read_text())
    for row in entry["results"]["comparisons"]:
        assert row["compared"] == 18
        kept = [step["step"] for step in row["steps"]]
        assert kept == ([0, 1, 2, 4, 8] if row["against"] == "full" else [])
    made = [validate_tables.comparisons(entry), validate_tables.steps(entry)]
    assert all(len(widths(text)) == 1 for text in made)


def test_profiling_becomes_a_record(tmp_path):
    out = tmp_path / "record.json"
    quick = ["--warmup", "1", "--runs", "2", "--tokens", "4", "--dtype", "float32"]
    options = ["--model", "tiny", "--device", "cpu", "--no-peer", *quick, "--out", str(out)]
    pictures = {path: path.read_bytes() for path in (ROOT / "docs").glob("*.png")}
    done = bench("profiling", *options)
    assert done.returncode == 0, done.stderr
    assert "residual" in done.stderr and done.stderr.rstrip().endswith("done")
    entry = json.loads(out.read_text())
    assert entry["complete"] is False, "rows a to f are to stand beside the baseline's"
    assert [own["settings"]["tokens"] for own in entry["results"]["ours"]] == [4]
    made = [make(entry) for source, make in tables.TABLES.values() if source == "profile"]
    says = "The run was cut off", "was not measured", "does not have them"
    assert all(any(each in text for each in says) for text in made)
    # The documents' pictures are those of the documents' record.
    assert all(path.read_bytes() == before for path, before in pictures.items())


def test_of_a_comparison_some_steps_of_the_first_row_are_kept():
    each = [
        {"step": step, "row": row, "agrees": row == 0, "kl": 0.1 * step}
        for step in range(9)
        for row in range(2)
    ]
    short = validation.shortened({"against": "full", "steps": each}, 9)
    assert [(step["step"], step["row"]) for step in short["steps"]] == [
        (0, 0), (1, 0), (2, 0), (4, 0), (8, 0),
    ]  # fmt: skip
    assert (short["compared"], short["agreeing"]) == (18, 9)
    assert short["largest_kl"] == pytest.approx(0.8)
    assert validation.shortened({"against": "float64", "steps": each}, 9)["steps"] == []


@given(st.integers(1, 2000))
def test_the_steps_shown_are_few_and_hold_both_ends(steps):
    shown = validation.shown_steps(steps)
    assert shown[0] == 0 and shown[-1] == steps - 1 and len(shown) <= 14
    assert shown == sorted(set(shown))


shapes = st.builds(
    GPT2Config,
    vocab_size=st.integers(1, 300),
    n_positions=st.integers(4, 40),
    n_embd=st.sampled_from([8, 24]),
    n_layer=st.integers(1, 3),
    n_head=st.sampled_from([1, 2]),
    tie_word_embeddings=st.booleans(),
)


@settings(max_examples=40)
@given(
    shapes,
    st.sampled_from(["float16", "float32"]),
    st.integers(1, 3),
    st.integers(0, 4),
    st.sampled_from([None, "int8"]),
)
def test_bytes_of_a_step_are_those_of_the_arrays(config, dtype, batch, context, quantize):
    weights = Weights.empty(config, dtype, quantize=quantize)
    read = {name: array for name, array in weights.items() if name != "wpe"}
    size = batch * weights.wpe[0].nbytes
    if not config.tie_word_embeddings:
        # A row of it per token: in int8 each with its scales.
        size += batch * read.pop("wte").nbytes // config.padded_vocab_size
    for name, array in read.items():
        one = weights.dtype.itemsize  # the float32 of two biases is not counted
        size += array.size * one if name in RESIDUAL_BIASES else array.nbytes
    if context:
        size += KVCache(config, batch, context, weights.dtype).nbytes
    assert shared.step_bytes(config, dtype, batch, context, quantize) == size


def test_the_cost_of_int8_becomes_a_record(tmp_path):
    out, text = tmp_path / "record.json", tmp_path / "text.txt"
    text.write_text("To be, or not to be: that is the question. " * 20)
    options = ["--text", str(text), "--bytes", "300", "--random", "tiny", "--device", "cpu"]
    done = bench("quantization", "--out", str(out), *options)
    assert done.returncode == 0, done.stderr
    entry = json.loads(out.read_text())
    embedded, random = entry["results"]["models"]
    assert embedded["text_bytes"] == 300 and "bits_per_byte" not in random["rows"][0]
    stored, int8, most = embedded["rows"]
    assert stored["logit_max_error"] == 0 < most["logit_rms_error"] < int8["logit_rms_error"]
    assert int8["weight_bytes"] < 0.3 * stored["weight_bytes"] and most["weight_bytes"] is None
    assert widths(tables.TABLES["quantization"][1](entry)) == {10}


def test_steps_of_a_model_in_int8_are_timed_against_its_own_bytes(tmp_path):
    out = tmp_path / "record.json"
    options = ["--device", "cpu", "--out", str(out), *RUNS["decode"].split()]
    done = bench("decode", "--model", "tiny", "--quantize", "int8", *options)
    assert done.returncode == 0, done.stderr
    results = json.loads(out.read_text())["results"]
    step = results["rows"][0]["steps"][0]
    assert step["bytes"] == shared.step_bytes(shared.TINY, "float32", 1, 16, "int8")
    assert "matrices in int8" in tables.TABLES["decode-int8"][1](json.loads(out.read_text()))


def test_a_size_that_does_not_fit_is_named(monkeypatch):
    free = 4 << 30
    runtime = types.SimpleNamespace(memGetInfo=lambda: (free, 8 << 30))
    pool = types.SimpleNamespace(free_all_blocks=lambda: None)
    cupy = types.SimpleNamespace(
        cuda=types.SimpleNamespace(runtime=runtime), get_default_memory_pool=lambda: pool
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    small, large = shared.config_of("124M"), shared.config_of("1558M")
    assert shared.too_large(small, "float16", 1, "cuda") == ""
    assert "4.0 GiB are free" in shared.too_large(large, "float16", 1, "cuda")
    assert shared.too_large(small, "float16", 1, "cuda", engines=8)
    assert shared.too_large(large, "float16", 1, "cpu") == ""


def test_the_reading_kernel_compiles():
    nvrtc = pytest.importorskip("cupy").cuda.nvrtc
    program = nvrtc.createProgram(shared.READ_KERNEL, "read.cu", [], [])
    nvrtc.compileProgram(program, ["-arch=sm_75"])  # raises with the log


def test_every_switch_is_tried_alone_and_all_together():
    assert ablation.combinations([]) == [()]
    assert ablation.combinations(["a"]) == [(), ("a",)]
    assert ablation.combinations(["a", "b"]) == [(), ("a",), ("b",), ("a", "b")]
    # The others are the graph's, which the persistent step replaces.
    whole = "persistent"
    assert ablation.combinations([whole]) == [(), (whole,)]
    assert ablation.combinations([whole, "a"]) == [(), (whole,), (whole, "a")]
    each = [(), (whole,), (whole, "a"), (whole, "b"), (whole, "a", "b")]
    assert ablation.combinations([whole, "a", "b"]) == each


def test_the_switches_are_listed_without_a_gpu():
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "bench" / "ablation.py", "--list"]
    listed = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert listed.returncode == 0, listed.stderr
    shown = [line.split()[0] for line in listed.stdout.splitlines()]
    assert shown == list(ablation.SWITCHES)


@given(st.integers(1, 20), st.integers(1, 100), st.integers(1, 1000))
def test_naive_runs_meet_every_bucket_before_they_are_timed(batch, prompt, tokens):
    """Every length of the run takes the same graph, or none, as one that was run before."""
    met = naive.lengths(batch, prompt, tokens)
    assert met == sorted(set(met)) and met[0] >= prompt and met[-1] == prompt + tokens - 1

    def bucket(length):
        return next((rows for rows in naive.BUCKETS if rows >= batch * length), None)

    assert {bucket(length) for length in range(prompt, prompt + tokens)} <= set(map(bucket, met))


def test_the_estimate_is_made_from_records(tmp_path, monkeypatch):
    monkeypatch.setattr(naive.record, "RESULTS", tmp_path)
    with pytest.raises(OSError):
        naive.estimate([1], 1, 32, 512)
    rows = {
        "peers": [{"engines": {"transformers eager": {"step": {"median_us": 4000.0}}}}],
        "prefill": [{"tokens": t, "device": {"median_us": 2.0 * t}} for t in (100, 200)],
        "decode": [{"batch": 1, "end_to_end": {"us_per_step": 500.0}}],
    }
    for name, found in rows.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": {"rows": found}}))
    # Two texts of 100 and 101 tokens: ours 200 + 202 us and twice 1500 of launches, theirs twice
    # 4000, and both with their caches.
    seconds = (402 + 3000 + 8000 + 2 * (1000 + 4000)) / 1e6
    assert naive.estimate([1], 2, 100, 2) == pytest.approx(naive.START_S + 2 * seconds)
    with pytest.raises(LookupError):
        naive.estimate([3], 1, 100, 2)


def test_switches_are_those_that_do_something():
    assert ablation.applicable("cpu", ["float32"], [1, 16]) == []
    every = list(ablation.SWITCHES)
    assert ablation.applicable("cuda", ["float16"], [1]) == every
    # Only a single row has its norm inside the product; the persistent step has up to four.
    apart = [name for name in every if name not in ("fused-norm", "persistent")]
    assert ablation.applicable("cuda", ["float16"], [16]) == apart
    assert ablation.applicable("cuda", ["float16"], [256]) == apart
    # These are products of many rows, which cuBLAS takes anyway.
    rest = [name for name in apart if name != "gemv"]
    assert ablation.applicable("cuda", ["float32"], [4, 16]) == rest
    assert ablation.applicable("cuda", ["float16"], [257]) == rest


def test_nothing_off_is_the_fastest_path_if_that_may_be_switched_off(monkeypatch, capsys):
    model = shared.random_model(shared.TINY, "float32", "cpu")
    times = {"persistent": 1.0, "graph": 2.0}
    monkeypatch.setattr(ablation.decode, "times", lambda model, rows: times)
    assert ablation.base(model, 1, ["graph"]) == "eager"  # what there is on the CPU
    assert ablation.base(model, 1, ["persistent"]) == "persistent"
    times = {"eager": 0.0, "persistent": 1.0}
    monkeypatch.setattr(ablation.decode, "usable", lambda model, rows: list(times)[: 3 - rows])
    assert ablation.base(model, 2, ["persistent"]) == "eager"
    assert capsys.readouterr().out == ""  # there was no choice
    assert ablation.base(model, 1, ["persistent"]) == "eager"
    assert "does not take the persistent step" in capsys.readouterr().out


def test_without_an_optimisation_the_text_is_the_same():
    model = shared.random_model(shared.TINY, "float32", "cpu")
    args = types.SimpleNamespace(tokens=12, runs=1)
    fused, overlaps = ops.norm_linear, graph.has_clusters
    seen = []

    def spied(*args, **options):
        seen.append("norm_linear")
        return fused(*args, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ops, "norm_linear", spied)
        ablation.speed(model, "eager", (), 2, args)
        assert seen
        seen.clear()
        # What needs a GPU changes nothing here; norm and product are really taken apart.
        ablation.speed(model, "eager", tuple(ablation.SWITCHES), 2, args)
        assert not seen
    assert ops.norm_linear is fused and graph.has_clusters is overlaps and model.gemv == "ours"


def test_norm_and_product_apart_are_what_they_are_together():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 8)), rng.standard_normal((5, 8))
    norm, bias = rng.standard_normal((2, 8)), rng.standard_normal(5)
    together = ops.norm_linear(x, *norm, 1e-5, weight, bias, activation="relu")
    shift = ops.shifted_bias(norm[1], weight, bias)
    options = {"activation": "relu", "shift": shift}
    apart = ablation._norm_then_linear(x, *norm, 1e-5, weight, bias, **options)
    np.testing.assert_array_equal(together, apart)


def test_no_engine_script_is_unused():
    found = {path.stem for path in (ROOT / "bench" / "peers").glob("*.py")} - {"interface"}
    used = {"profile_hf", "hf_operators"}  # a script of its own, and its other half
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "bench").rglob("*.py")]
    # Started by its name, or imported.
    said = [(f'"{n}"', f'"{n}.py"', f"from {n} import", f'"{n}:') for n in found]
    used |= {
        n for n, ways in zip(found, said, strict=True) if any(w in t for w in ways for t in texts)
    }
    assert found <= used


def test_a_soak_becomes_a_record(tmp_path):
    out = tmp_path / "record.json"
    options = ["--device", "cpu", "--requests", "400", "--warmup", "200", "--out", str(out)]
    done = bench("soak", *options)
    assert done.returncode == 0 and "nothing grew" in done.stdout, done.stdout + done.stderr
    entry = json.loads(out.read_text())
    results = entry["results"]
    assert results["failed"] == [] and len(results["rows"]) >= 2
    assert set(results["counts"]) == set(soak.Load.WAYS), "every way was taken"
    assert sum(results["counts"].values()) == results["rows"][-1]["requests"] >= 400
    assert widths(tables.soak(entry)) == {6}


def test_a_start_on_a_gpu_says_what_all_kernels_take():
    timing = Timing.of([1.5]).as_dict()
    results = {"model": "124M", "device": "cuda", "first_s": 2.5, "empty": timing, "warm": timing}
    results["compile"] = {"seconds": 6.25, "cubins": 260, "cores": 16}
    entry = {"date": "2026-01-02", "environment": {"gpu": "NVIDIA H200"}, "results": results}
    made = tables.startup(entry)
    assert widths(made) == {6} and "| 2.50 | 1.50 (1.50 to 1.50) | 6.2 |" in made
    assert "260 cubins compiled on 16 cores" in made


@pytest.mark.parametrize("name", soak.ALLOWED)
def test_what_grows_by_more_than_is_allowed_is_named(name):
    within = dict(soak.ALLOWED)
    assert soak.too_much(within) == []
    (said,) = soak.too_much(within | {name: soak.ALLOWED[name] + 1})
    assert said.startswith(f"{name} grew by ")


def test_a_leak_is_found(tmp_path, monkeypatch):
    """A few objects that each request leaves behind."""
    shared.write_checkpoint(tmp_path, shared.TINY, "float32")
    kept, score = [], soak.Load.score

    def leaking(self):
        kept.extend([[] for _ in range(2000)])
        return score(self)

    monkeypatch.setattr(soak.Load, "score", leaking)
    with load(str(tmp_path), device="cpu") as lm:
        found = soak.soak(lm, 300, 100, gpu=False)
    assert found["growth"]["objects"] >= 2000
    assert "objects grew by" in " ".join(found["failed"])
