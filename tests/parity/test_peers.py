"""The engines of the comparisons, at a tiny size on the CPU: they run, and write the same text."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from gpt2cupy.record import ROOT

sys.path.insert(0, str(ROOT / "bench"))
from bench.report import peer_tables, tables

TINY = ["--model", "tiny", "--device", "cpu"]
ENGINES = {
    "peers": ["gpt2cupy", "transformers eager", "transformers compiled", "PyTorch step"],
    "naive": [
        f"{engine} {way}" for engine in ("gpt2cupy", "transformers") for way in ("cached", "naive")
    ],
}
TABLES = {"peers": lambda entry: peer_tables.peers({"peers": entry}), "naive": tables.naive}


def bench(script: str, *options: str) -> None:
    command = [sys.executable, ROOT / "bench" / f"{script}.py", *TINY, *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ENGINES)
def test_every_engine_writes_the_same_text(script, tmp_path):
    out = tmp_path / "record.json"
    lengths = ("--prompt", "5", "--tokens", "40", "--rounds", "2")
    bench(script, "--dtype", "float32", "--batch", "1,3", *lengths, "--out", str(out))
    entry = json.loads(out.read_text())
    rows = entry["results"]["rows"]
    assert [row["batch"] for row in rows] == [1, 3]
    for row in rows:
        assert all("not installed" in why or "GGUF" in why for why in row["skipped"].values())
        assert set(row["skipped"]) <= {"llama.cpp", "tinygrad", "vLLM"}
        assert set(row["engines"]) >= set(ENGINES[script])
        same = {name: one["same_tokens"] for name, one in row["engines"].items()}
        assert set(same.values()) == {40}, same
    widths = {line.count("|") for line in TABLES[script](entry).splitlines()} - {0}
    assert len(widths) == 1


def test_the_baseline_of_the_profile(tmp_path):
    out = tmp_path / "record.json"
    quick = ("--warmup", "1", "--runs", "1", "--tokens", "3", "--dtype", "float32")
    bench("profiling", *quick, "--out", str(out))
    entry = json.loads(out.read_text())
    assert entry["complete"] is True
    (peer,) = entry["results"]["peers"]
    assert peer["settings"]["warmup"] == 1 and peer["operators"]["rows"]
    made = tables.TABLES["profile-attention"][1](entry)
    assert made.count("| transformers, float32 |") == 8 and "gpt2cupy, float32" in made


def test_the_cpu_comparison(tmp_path):
    out = tmp_path / "record.json"
    bench("cpu", "--rounds", "1", "--tokens", "10", "--out", str(out))
    entry = json.loads(out.read_text())
    engines = entry["results"]["engines"]
    engines.pop("llama.cpp", None)  # it does not say which tokens it chose
    assert len(engines) == 6 and {one["same_tokens"] for one in engines.values()} == {10}
    assert entry["results"]["best_of_transformers"] in tables.cpu(entry)
