"""Documents equal their records, and a stale record is noticed."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import pytest

from gpt2cupy import record

PATH = record.ROOT / "bench" / "report.py"
_TIMING = {"median_us": 800.4, "p10_us": 790.0, "p90_us": 850.0, "runs": 50}


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("report", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def entry(results, sources=("gpt2cupy/cache.py",)):
    return {
        "date": "2026-01-02",
        "command": "python bench/decode.py",
        "environment": {"gpu": "NVIDIA H200", "driver": "580.1", "cuda_driver": 13000},
        "sources": list(sources),
        "source_hash": record.source_hash(sources),
        "results": results,
    }


@pytest.fixture
def example(tmp_path):
    """A folder with one document and one record of a decode step."""
    row = {
        "dtype": "float16",
        "batch": 4,
        "gemv": "ours",
        "steps": [{"context": 128, "step": _TIMING, "host": _TIMING | {"median_us": 512.0}}],
        "end_to_end": {"prompt": 32, "tokens": 200, "us_per_step": 1000.0},
    }
    results = {"model": "gpt2", "decoder": "eager", "weights": "random", "rows": [row]}
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "decode.json").write_text(json.dumps(entry(results)))
    (tmp_path / "README.md").write_text("A\n\n<!-- table: decode -->\n<!-- end -->\n\nB\n")
    return tmp_path


def run(folder, *options):
    command = [sys.executable, PATH, "--root", folder, "--results", folder / "results", *options]
    return subprocess.run(command, capture_output=True, text=True)


def test_documents_equal_their_records(report, capsys):
    assert report.update(record.ROOT, record.RESULTS, check=True) == 0, capsys.readouterr().out


def test_a_table_is_written_from_its_record(example):
    assert run(example).returncode == 0
    text = (example / "README.md").read_text()
    assert "| float16 | 4 | - | 800 | 512 | 1,000 | 4,000 |" in text
    assert "NVIDIA H200; driver 580.1, CUDA 13.0; 2026-01-02." in text
    assert text.startswith("A\n") and text.endswith("<!-- end -->\n\nB\n")
    assert run(example, "--check").returncode == 0


def test_a_changed_number_is_noticed(example):
    run(example)
    path = example / "README.md"
    path.write_text(path.read_text().replace("| 800 |", "| 700 |"))
    checked = run(example, "--check")
    assert checked.returncode == 1 and "README.md" in checked.stdout
    assert "| 700 |" in path.read_text(), "--check must change nothing"
    run(example)
    assert "| 800 |" in path.read_text()


def test_a_table_without_a_record_stays(example):
    path = example / "README.md"
    path.write_text("<!-- table: startup -->\nby hand\n<!-- end -->\n")
    checked = run(example, "--check")
    assert checked.returncode == 0 and "startup is left as it is" in checked.stderr
    assert "by hand" in path.read_text()


def test_an_unknown_table_is_an_error(example):
    (example / "README.md").write_text("<!-- table: nothing -->\n<!-- end -->\n")
    checked = run(example)
    assert checked.returncode == 1 and "'nothing'" in checked.stderr


def test_stale_records(example):
    assert run(example, "--records", "--strict").returncode == 0
    path = example / "results" / "decode.json"
    old = json.loads(path.read_text()) | {"source_hash": "0" * 64}
    path.write_text(json.dumps(old))
    listed = run(example, "--records")
    assert listed.returncode == 0 and "stale" in listed.stdout and "NVIDIA H200" in listed.stdout
    assert run(example, "--records", "--strict").returncode == 1


def test_a_changed_source_makes_a_record_stale(tmp_path, monkeypatch):
    (tmp_path / "kernel.cu").write_text("one")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    written = entry({}, ["*.cu"])
    assert record.is_current(written)
    (tmp_path / "kernel.cu").write_text("two")
    assert not record.is_current(written)
    (tmp_path / "kernel.cu").write_text("one")
    (tmp_path / "more.cu").write_text("")
    assert not record.is_current(written)


@pytest.mark.parametrize("name", ["startup", "cpu", "gpu-tests"])
def test_every_table_can_be_made(report, name):
    results = {
        "startup": {"model": "124M", "device": "cuda", "first_s": 9.0, "warm": _TIMING},
        "cpu": {
            "model": "124M shape, random weights",
            "dtype": "float32",
            "batch": 1,
            "threads": 2,
            "prompt_tokens": 32,
            "new_tokens": 48,
            "rounds": 7,
            "engines": {"gpt2cupy": {"prefill_ms": 300.0, "tokens_per_second": 20.5}},
            "best_of_transformers": "transformers eager loop",
            "ratio_to_best": 1.2,
        },
        "gpu-tests": {"passed": 9, "failed": [], "skipped": {"a": "why"}},
    }[name]
    lines = report.TABLES[name](entry(results)).splitlines()
    widths = {line.count("|") for line in lines if line.startswith("|")}
    assert len(widths) == 1
