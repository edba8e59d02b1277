"""Engines as processes: run in turn, compared, and left out with a reason when they fail."""

from __future__ import annotations

import json
import os
import sys

import numpy as np
import pytest

from gpt2cupy import GPT2
from gpt2cupy.record import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import shared
import workers


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
    first, asked = job["prompts"][0][-1], []
    def run(tokens):
        asked.append(tokens)
        print("run", tokens)  # must not disturb the answers
        if job.get("dies") and tokens == job["tokens"]:
            sys.exit(3)
        step = job.get("step", 1)
        return [first + step * i for i in range(tokens)], 0.0, 0.5, 0.5 + 0.25 * (tokens - 1)
    return run, {"form": "counting", "asked": asked}
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
        found = comparison.run(JOB | {"tokens": 10}, rounds=3)
    assert found["skipped"] == {}
    one, two = found["engines"]["one"], found["engines"]["two"]
    assert one["step"] == {"median_us": 250e3, "p10_us": 250e3, "p90_us": 250e3, "runs": 3}
    assert one["prefill"]["median_us"] == 500e3
    assert (one["same_tokens"], two["same_tokens"]) == (10, 1)
    assert (one["asked"], two["asked"]) == ([10, 10], [8])  # whole warm-up runs, or a short one
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


def test_what_is_not_installed_is_not_started(scripts):
    specs = {
        "module": workers.Spec("counting", needs=("numpy", "no_such_module")),
        "program": workers.Spec("counting", needs=("no-such-program",)),
        "both": workers.Spec("counting", needs=("numpy", "sh")),
    }
    with workers.Comparison(specs) as comparison:
        assert list(comparison.workers) == ["both"]
        found = comparison.run(JOB, rounds=1)
    assert list(found["engines"]) == ["both"]
    assert found["skipped"] == {
        "module": "no_such_module not installed",
        "program": "no-such-program not installed",
    }


@pytest.mark.parametrize("together", [True, False])
def test_engines_may_be_prepared_together(scripts, capsys, together):
    specs = {
        "refuses": workers.Spec("counting", {"refuses": True}),
        "one": workers.Spec("counting"),
        "two": workers.Spec("counting", warmup=0),
    }
    with workers.Comparison(specs, together=together) as comparison:
        found = comparison.run(JOB, rounds=2)
    assert list(found["engines"]) == ["one", "two"]
    assert found["skipped"] == {"refuses": "ValueError: not this job"}
    lines = [line.partition("] ")[2] for line in capsys.readouterr().err.splitlines()]
    told = [line for line in lines if line.startswith(("one", "two"))]
    assert told == ["one: ready", "two: ready", *["one: 250000 us a step"],
                    *["two: 250000 us a step"] * 2, "one: 250000 us a step"]  # fmt: skip


def test_what_an_engine_writes_to_its_descriptors_disturbs_no_answer(scripts):
    noisy = """
import os
def prepare(job):
    os.write(1, b"library\\n")
    os.system("echo from a process")
    return lambda tokens: ([1] * tokens, 0.0, 0.5, 1.0), {}
serve((), prepare)
"""
    (scripts / "noisy.py").write_text((scripts / "missing.py").read_text().replace(
        "import no_such_module\n", noisy))  # fmt: skip
    with workers.Comparison({"noisy": workers.Spec("noisy")}) as comparison:
        assert list(comparison.run(JOB, rounds=1)["engines"]) == ["noisy"]


FAKE_VLLM = """
import time
from types import SimpleNamespace
now = [0.0]
time.perf_counter = lambda: now[0]
class SamplingParams:
    def __init__(self, **options):
        self.options = options
class LLM:
    def __init__(self, model, **options):
        assert options["enable_prefix_caching"] is False and options["max_num_seqs"] == 1
        assert options["max_model_len"] == 7
    def generate(self, prompts, params, use_tqdm):
        assert prompts == [{"prompt_token_ids": [1, 2]}] and params.options["ignore_eos"]
        count = params.options["max_tokens"]
        now[0] += 0.25 * count
        return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(range(count)))])]
"""


def test_vllm_is_read(tmp_path, monkeypatch):
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").write_text(FAKE_VLLM)
    about = tmp_path / "vllm-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = JOB | {"folder": "model", "dtype": "float16", "device": "cuda"}
    with workers.Comparison({"vLLM": workers.Spec("vllm_engine", needs=("vllm",))}) as comparison:
        found = comparison.run(job, rounds=1)
        on_cpu = comparison.run(job | {"device": "cpu"}, rounds=1)
    figures = found["engines"]["vLLM"]
    assert figures["versions"] == {"vllm": "1.0"} and figures["same_tokens"] == 5
    assert figures["prefill"]["median_us"] == figures["step"]["median_us"] == 250e3
    assert on_cpu["skipped"] == {"vLLM": "ValueError: vLLM is timed on a GPU"}


def test_llama_bench_is_read(tmp_path, monkeypatch):
    program = tmp_path / "llama-bench"
    tests = [{"n_prompt": 2, "n_gen": 0, "avg_ns": 5e6}, {"n_prompt": 0, "n_gen": 4, "avg_ns": 8e6}]
    program.write_text(f"#!/bin/sh\necho noise >&2\necho '{json.dumps(tests)}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/usr/bin{os.pathsep}/bin")
    (tmp_path / "gguf.py").write_text("")
    package = tmp_path / "gguf-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: gguf\nVersion: 1.0\n")
    (tmp_path / "model.gguf").write_text("made before")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = {"folder": str(tmp_path), "device": "cpu"}
    job = JOB | {"dtype": "float16"}
    with workers.Comparison({"llama": workers.Spec("llama_bench", options)}) as comparison:
        found = comparison.run(job, rounds=1)
        several = comparison.run(job | {"prompts": [[1], [2]]}, rounds=1)
    llama = found["engines"]["llama"]
    assert llama["prefill"]["median_us"] == pytest.approx(5e3)
    assert llama["step"]["median_us"] == pytest.approx(2e3)
    assert llama["same_tokens"] is None
    assert "llama-batched-bench is not on PATH" in several["skipped"]["llama"]
    program = tmp_path / "llama-batched-bench"
    program.write_text('#!/bin/sh\necho main: noise\necho \'{"t_pp": 0.006, "t_tg": 0.012}\'\n')
    program.chmod(0o755)
    with workers.Comparison({"llama": workers.Spec("llama_bench", options)}) as comparison:
        several = comparison.run(job | {"prompts": [[1], [2]]}, rounds=1)
        other = comparison.run(job | {"dtype": "bfloat16"}, rounds=1)
    assert several["engines"]["llama"]["prefill"]["median_us"] == pytest.approx(6e3)
    assert several["engines"]["llama"]["step"]["median_us"] == pytest.approx(3e3)
    assert "in float16 or float32" in other["skipped"]["llama"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_checkpoint_becomes_a_gguf_file(tmp_path, monkeypatch, dtype):
    gguf = pytest.importorskip("gguf", reason="llama.cpp is timed with the extra bench")
    monkeypatch.syspath_prepend(ROOT / "bench" / "peers")
    import llama_bench

    shared.write_checkpoint(tmp_path, shared.TINY, dtype)
    found = gguf.GGUFReader(llama_bench.convert(tmp_path))
    tensors = {tensor.name: tensor.data for tensor in found.tensors}
    ours = GPT2.from_pretrained(str(tmp_path), device="cpu").weights
    np.testing.assert_array_equal(tensors["blk.1.attn_qkv.weight"], ours.qkv_w[1])
    np.testing.assert_array_equal(tensors["blk.0.ffn_down.bias"], ours.out_b[0])
    np.testing.assert_array_equal(tensors["token_embd.weight"], ours.wte[: shared.TINY.vocab_size])
    assert tensors["position_embd.weight"].dtype == np.float32
    assert tensors["blk.1.attn_qkv.weight"].dtype == dtype
    assert len(tensors) == 4 + 12 * shared.TINY.n_layer
