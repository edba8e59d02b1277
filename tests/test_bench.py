"""The benchmarks run at a tiny size without a GPU, and what they count is right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy import GPT2Config, ops
from gpt2cupy.cache import KVCache
from gpt2cupy.decode import graph
from gpt2cupy.record import ROOT
from gpt2cupy.weights import Weights

sys.path.insert(0, str(ROOT / "bench"))
import ablation
import shared
import tables
import validation
import workers

RUNS = {
    "decode": "--dtype float32 --batch 1,2 --context 16,100 --runs 2 --tokens 6",
    "prefill": "--dtype float32 --tokens 8,64 --runs 2",
    "ablation": "--dtype float32 --batch 1,2 --tokens 6 --runs 2",
    "startup": "--dtype float32 --runs 1",
}


def bench(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user in another folder does."""
    command = [sys.executable, ROOT / "bench" / f"{script}.py", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )


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
    for row in entry["results"].get("rows", []):
        row["model"] = "124M"  # what the tables of the documents show
    sources = {script, "decode-sizes"} if script == "decode" else {script}
    made = [make(entry) for source, make in tables.TABLES.values() if source in sources]
    assert len(made) == len(sources) and all(len(widths(text)) == 1 for text in made)


@pytest.mark.parametrize(
    "script, options, says",
    [
        (
            "ablation",
            ["--model", "tiny", "--disable", "warp-drive"],
            "unknown switch 'warp-drive'. There are:",
        ),
        ("decode", ["--decode", "eager,telepathy"], "unknown decode path 'telepathy'"),
        ("decode", ["--dtype", "int3"], "unknown dtype 'int3'. There are: float16, bfloat16"),
        ("prefill", ["--model", "7B"], "7B"),
        ("gemv", [], "Run it on a GPU"),
        ("cpu", ["--device", "cuda"], "unknown device 'cuda'"),
        ("peers", ["--engines", "nothing"], "unknown engine 'nothing'"),
        ("naive", ["--decode", "telepathy"], "unknown decode path"),
    ],
)
def test_what_cannot_be_measured_is_one_line(script, options, says, tmp_path):
    out = tmp_path / "record.json"
    device = [] if "--device" in options else ["--device", "cpu"]
    failed = bench(script, *device, "--out", str(out), *options)
    assert failed.returncode == 1 and says in failed.stderr
    assert failed.stderr.startswith(f"{script}.py: ") and failed.stderr.count("\n") == 1
    assert not out.exists()


@pytest.mark.parametrize("script", ["decode", "prefill", "ablation", "peers", "naive", "gemv"])
def test_without_a_gpu_the_default_device_is_a_clear_error(script, tmp_path):
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "bench" / f"{script}.py", "--out", tmp_path / "record.json"]
    failed = subprocess.run(command, capture_output=True, text=True, env=hidden)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert failed.stderr.startswith(f"{script}.py: ") and "GPU" in failed.stderr


def test_what_was_measured_is_kept_when_the_rest_fails(tmp_path):
    out = tmp_path / "record.json"
    options = ["--device", "cpu", "--out", str(out), "--dtype", "float32", "--runs", "1"]
    failed = bench("prefill", "--model", "tiny,7B", "--tokens", "4", *options)
    assert failed.returncode == 1 and "7B" in failed.stderr
    assert [row["model"] for row in json.loads(out.read_text())["results"]["rows"]] == ["tiny"]


def test_validation_becomes_a_record(tmp_path):
    known = subprocess.run(
        [sys.executable, "-m", "gpt2cupy.cli", "validate", "--help"], capture_output=True, cwd=ROOT
    )
    if known.returncode:
        pytest.skip("gpt2cupy validate: no such command")
    out = tmp_path / "record.json"
    options = ["--model", "tiny", "--device", "cpu", "--steps", "9", "--out", str(out)]
    done = bench("validation", *options)
    assert done.returncode == 0 and "passed" in done.stdout, done.stderr
    entry = json.loads(out.read_text())
    for row in entry["results"]["comparisons"]:
        assert row["compared"] == 18
        kept = [step["step"] for step in row["steps"]]
        assert kept == ([0, 1, 2, 4, 8] if row["against"] == "full" else [])
    made = [tables.validate(entry), tables.validate_steps(entry)]
    assert all(len(widths(text)) == 1 for text in made)


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
@given(shapes, st.sampled_from(["float16", "float32"]), st.integers(1, 3), st.integers(0, 4))
def test_bytes_of_a_step_are_those_of_the_arrays(config, dtype, batch, context):
    weights = Weights.empty(config, dtype)
    read = {name: array for name, array in weights.items() if name != "wpe"}
    if not config.tie_word_embeddings:
        del read["wte"]
    size = sum(array.size for array in read.values()) * weights.dtype.itemsize
    size += batch * weights.wpe[0].nbytes * (1 if config.tie_word_embeddings else 2)
    if context:
        size += KVCache(config, batch, context, weights.dtype).nbytes
    assert shared.step_bytes(config, dtype, batch, context) == size


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


def test_switches_are_those_that_do_something():
    assert ablation.applicable("cpu", ["float32"], [1, 16]) == []
    every = list(ablation.SWITCHES)
    assert ablation.applicable("cuda", ["float16"], [1]) == every
    assert ablation.applicable("cuda", ["float16"], [16]) == every
    # These are products of many rows, which cuBLAS takes anyway.
    rest = [name for name in every if name not in ("gemv", "fused-norm")]
    assert ablation.applicable("cuda", ["float32"], [4, 16]) == rest
    assert ablation.applicable("cuda", ["float16"], [17]) == rest


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
        ablation.speed(model, (), 2, args)
        assert seen
        seen.clear()
        # What needs a GPU changes nothing here; norm and product are really taken apart.
        ablation.speed(model, tuple(ablation.SWITCHES), 2, args)
        assert not seen
    assert ops.norm_linear is fused and graph.has_clusters is overlaps and model.gemv == "ours"


def test_norm_and_product_apart_are_what_they_are_together():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 8)), rng.standard_normal((5, 8))
    norm, bias = rng.standard_normal((2, 8)), rng.standard_normal(5)
    together = ops.norm_linear(x, *norm, 1e-5, weight, bias, activation="relu")
    apart = ablation._norm_then_linear(x, *norm, 1e-5, weight, bias, activation="relu")
    np.testing.assert_array_equal(together, apart)


@pytest.fixture
def scripts(tmp_path, monkeypatch):
    """A folder of engines of our own instead of bench/peers."""
    monkeypatch.setattr(workers, "PEERS", tmp_path)
    # An engine that counts up from its first prompt's last id, so that ids can be compared.
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'bench' / 'peers')!r})\n"
    start += "from interface import serve\n"

    def write(name: str, body: str) -> None:
        (tmp_path / f"{name}.py").write_text(start + body)

    counting = """
def prepare(job):
    if job.get("refuses"):
        raise ValueError("not this job")
    first = job["prompts"][0][-1]
    def run(tokens):
        print("run", tokens)  # must not disturb the answers
        if job.get("dies") and tokens == job["tokens"]:
            sys.exit(3)
        step = job.get("step", 1)
        return [first + step * i for i in range(tokens)], 0.0, 0.5, 0.5 + 0.25 * (tokens - 1)
    return run, {"form": "counting"}
serve(("numpy",), prepare)
"""
    write("counting", counting)
    write("missing", "import no_such_module\n")
    return tmp_path


JOB = {"prompts": [[1, 2]], "tokens": 5}


def test_engines_run_in_turn_and_are_compared(scripts):
    specs = {
        "one": workers.Spec("counting"),
        "two": workers.Spec("counting", {"step": 2}, warmup=0),
    }
    with workers.Comparison(specs) as comparison:
        found = comparison.run(JOB, rounds=3)
    assert found["skipped"] == {}
    one, two = found["engines"]["one"], found["engines"]["two"]
    assert one["step"] == {"median_us": 250e3, "p10_us": 250e3, "p90_us": 250e3, "runs": 3}
    assert one["prefill"]["median_us"] == 500e3
    assert (one["same_tokens"], two["same_tokens"]) == (5, 1)
    assert one["versions"] == {"numpy": np.__version__} and one["form"] == "counting"


def test_an_engine_that_fails_is_skipped_with_its_reason(scripts):
    specs = {
        "missing": workers.Spec("missing"),
        "refuses": workers.Spec("counting", {"refuses": True}),
        "dies": workers.Spec("counting", {"dies": True}, warmup=0),
        "works": workers.Spec("counting"),
    }
    with workers.Comparison(specs) as comparison:
        found = comparison.run(JOB | {"tokens": 9}, rounds=2)
        again = comparison.run(JOB | {"tokens": 9}, rounds=1)
    assert list(found["engines"]) == list(again["engines"]) == ["works"]
    assert "exit status 1" in found["skipped"]["missing"]
    assert found["skipped"]["refuses"] == "ValueError: not this job"
    assert "exit status 3" in found["skipped"]["dies"]
    assert found["skipped"].keys() == again["skipped"].keys()


def test_llama_bench_is_read(tmp_path, monkeypatch):
    program = tmp_path / "llama-bench"
    tests = [{"n_prompt": 2, "n_gen": 0, "avg_ns": 5e6}, {"n_prompt": 0, "n_gen": 4, "avg_ns": 8e6}]
    program.write_text(f"#!/bin/sh\necho noise >&2\necho '{json.dumps(tests)}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    options = {"gguf": "m.gguf", "device": "cpu"}
    with workers.Comparison({"llama": workers.Spec("llama_bench", options)}) as comparison:
        found = comparison.run(JOB, rounds=1)
        several = comparison.run(JOB | {"prompts": [[1], [2]]}, rounds=1)
    llama = found["engines"]["llama"]
    assert llama["prefill"]["median_us"] == pytest.approx(5e3)
    assert llama["step"]["median_us"] == pytest.approx(2e3)
    assert llama["same_tokens"] is None
    assert "one sequence" in several["skipped"]["llama"]


def test_no_engine_script_is_unused():
    found = {path.stem for path in (ROOT / "bench" / "peers").glob("*.py")} - {"interface"}
    used = {"profile_hf"}  # a script of its own
    for script in ("peers", "naive", "cpu"):
        text = Path(ROOT / "bench" / f"{script}.py").read_text()
        used |= {name for name in found if f'"{name}"' in text}
    assert found <= used
