"""What a benchmark cannot measure it says in one line, before it measures anything."""

from __future__ import annotations

import importlib
import os
import sys

import pytest
from bench_runs import RUNS, bench

from gpt2cupy.record import ROOT

sys.path.insert(0, str(ROOT / "bench"))
import arguments


@pytest.mark.parametrize(
    "script, options, says",
    [
        (
            "ablation",
            ["--model", "tiny", "--disable", "warp-drive"],
            "unknown switch 'warp-drive'. There are:",
        ),
        ("decode", ["--decode", "eager,telepathy"], "unknown decode path 'telepathy'"),
        ("batches", ["--decode", "telepathy"], "unknown decode path 'telepathy'"),
        ("decode", ["--dtype", "int3"], "unknown dtype 'int3'. There are: float16, bfloat16"),
        ("prefill", ["--model", "7B"], "7B"),
        ("gemv", [], "Run it on a GPU"),
        ("cpu", ["--device", "cuda"], "unknown device 'cuda'"),
        ("peers", ["--engines", "nothing"], "unknown engine 'nothing'"),
        ("naive", ["--decode", "telepathy"], "unknown decode path"),
        ("profiling", ["--model", "7B"], "7B"),
        ("profiling", ["--decode", "telepathy"], "unknown decode path 'telepathy'"),
        ("ablation", ["--disable", ","], "the list is empty (--disable)"),
        (
            "ablation",
            ["--model", "tiny", "--tokens", "6", "--disable", "graph"],
            "switch 'graph' does not apply here (--device cpu",
        ),
        ("startup", ["--dtype", "int3"], "unknown dtype 'int3'"),
        ("quantization", ["--text", "no such file"], "cannot be read"),
    ],
)
def test_what_cannot_be_measured_is_one_line(script, options, says, tmp_path):
    out = tmp_path / "record.json"
    device = [] if "--device" in options else ["--device", "cpu"]
    failed = bench(script, *device, "--out", str(out), *options)
    assert failed.returncode == 1 and says in failed.stderr
    assert failed.stderr.startswith(f"{script}.py: ") and failed.stderr.count("\n") == 1
    assert not out.exists()


TOO_SMALL = [
    ("ablation", ["--tokens", "1"], "1 is too small (--tokens). Give 2 or more"),
    ("ablation", ["--runs", "0"], "0 is too small (--runs)"),
    ("decode", ["--batch", "4,0"], "0 is too small (--batch)"),
    ("decode", ["--batch", ","], "the list is empty (--batch)"),
    ("decode", ["--tokens", "1"], "1 is too small (--tokens)"),
    ("naive", ["--rounds", "0"], "0 is too small (--rounds)"),
    ("naive", ["--tokens", "1"], "1 is too small (--tokens)"),
    ("peers", ["--tokens", "1"], "1 is too small (--tokens)"),
    ("prefill", ["--tokens", "8,0"], "0 is too small (--tokens)"),
    ("batches", ["--large", "0x5"], "0 is too small (--large)"),
    ("soak", ["--warmup", "0"], "0 is too small (--warmup)"),
    ("cpu", ["--tokens", "1"], "1 is too small (--tokens)"),
    ("validation", ["--steps", "0"], "0 is too small (--steps)"),
    ("profiling", ["--runs", "0"], "0 is too small (--runs)"),
]
TOO_LONG = [
    ("decode", [], "steps at context 128: 131 tokens exceed the context of 128 (--model tiny)"),
    ("decode", ["--context", "9"], "--prompt 32 and --tokens 200: 232 tokens exceed"),
    ("batches", [], "steps at context 128"),
    ("batches", ["--context", "9", "--at", "9"], "steps at context 512"),
    ("prefill", [], "--tokens: 1024 tokens exceed the context of 128"),
    ("ablation", [], "a prompt of 32 and --tokens 512"),
    ("invariance", [], "steps at context 256"),
    ("naive", ["--tokens", "5000"], "--prompt 32 and --tokens 5000"),
    ("peers", ["--tokens", "97"], "129 tokens exceed the context of 128"),
    ("cpu", ["--tokens", "97"], "129 tokens exceed the context of 128"),
    ("profiling", ["--tokens", "125"], "129 tokens exceed the context of 128"),
]


@pytest.fixture
def refused(monkeypatch, tmp_path):
    """What a script says about arguments, if it neither measures nor makes a model."""

    def refused(script: str, *options: str) -> str:
        module = importlib.import_module(script)
        for name in ("random_model", "write_checkpoint", "Reader", "Comparison"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("measured"))
        out = [] if "--out" in options else ["--out", str(tmp_path / "record.json")]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--device", "cpu", *out, *options])
        with pytest.raises(SystemExit) as ended:
            arguments.main(module.run)
        assert isinstance(ended.value.code, str) and ended.value.code.startswith(f"{script}.py: ")
        assert not list(tmp_path.glob("*.json"))
        return ended.value.code

    return refused


@pytest.mark.parametrize("script, options, says", TOO_SMALL + TOO_LONG)
def test_numbers_that_cannot_be_measured(refused, script, options, says):
    assert says in refused(script, "--model", "tiny", *options)


SCRIPTS = "ablation batches cpu decode invariance naive peers prefill profiling soak startup"


@pytest.mark.parametrize("script", [*SCRIPTS.split(), "validation", "quantization"])
def test_a_record_that_cannot_be_written_is_found_before_measuring(refused, script, tmp_path):
    options = ["--text", __file__] if script == "quantization" else ["--model", "tiny"]
    if script in ("ablation", "batches", "decode", "invariance", "naive", "peers", "prefill"):
        options += RUNS.get(script, "--tokens 6").split()
    assert "cannot be written" in refused(script, *options, "--out", str(tmp_path))
    (tmp_path / "file").write_text("")
    inside = str(tmp_path / "file" / "record.json")
    assert "(--out). Name a file in a folder" in refused(script, *options, "--out", inside)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_record_on_a_full_disk(tmp_path):
    options = ["--device", "cpu", "--tokens", "4", "--runs", "1", "--dtype", "float32"]
    failed = bench("prefill", "--model", "tiny", *options, "--out", "/dev/full")
    assert failed.returncode == 1 and "1 x 4" in failed.stdout
    assert failed.stderr.startswith("prefill.py: the record cannot be written: No space left")


def test_switches_are_checked_before_the_device():
    failed = bench("ablation", "--disable", "warp-drive", CUDA_VISIBLE_DEVICES="")
    assert failed.returncode == 1 and "unknown switch 'warp-drive'" in failed.stderr


ON_A_GPU = "decode batches prefill ablation peers naive gemv profiling soak invariance validation"


@pytest.mark.parametrize("script", ON_A_GPU.split())
def test_without_a_gpu_the_default_device_is_a_clear_error(script, tmp_path):
    failed = bench(script, "--out", str(tmp_path / "record.json"), CUDA_VISIBLE_DEVICES="")
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, failed.stderr
    assert failed.stderr.startswith(f"{script}.py: ") and "GPU" in failed.stderr
    assert "device=" not in failed.stderr and "se --device cpu" in failed.stderr
