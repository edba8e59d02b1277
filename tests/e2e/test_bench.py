"""The benchmarks of the server run on the CPU, and their records become tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from gpt2cupy import record


def bench(script, out, *options):
    done = subprocess.run(
        [sys.executable, str(record.ROOT / "bench" / script), "--device", "cpu", "--model", "tiny",
         "--processes", "2", "--seconds", "1", "--prompt", "12", "--tokens", "6", "--out", str(out),
         *options],
        capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_a_load_becomes_a_record_and_its_tables(tmp_path, monkeypatch):
    parts = ("--parts", "ready,closed,open,one", "--clients", "2", "--rates", "20")
    options = ("--dtype", "float32", "--slots", "4", "--runs", "2")
    entry = bench("server.py", tmp_path / "server.json", *parts, *options)
    assert entry["complete"]
    rows = entry["results"]["rows"]
    assert {row["part"] for row in rows} == {"ready", "closed", "open", "one"}
    assert not any(row.get("errors") for row in rows)
    for module in ("server/worker.py", "server/app.py", "generation/engine.py"):
        assert f"gpt2cupy/{module}" in entry["files"]
    monkeypatch.syspath_prepend(str(record.ROOT))
    from bench.report import server_tables

    one = next(row for row in rows if row["part"] == "one") | {"engine": {}, "part": "norms"}
    rows += [one | {"what": "ours, fused"}, one | {"what": "ours, unfused"}]
    tables = ("load", "arrivals", "processes", "one", "norms")
    texts = [getattr(server_tables, name)(entry) for name in tables]
    assert all(text.count("\n") > 3 for text in texts)
    assert "ours, unfused" in texts[-1]


def test_what_the_server_could_be_made_of_becomes_a_record_and_a_table(tmp_path):
    out = tmp_path / "choices.json"
    done = subprocess.run(
        [sys.executable, str(record.ROOT / "bench" / "server_choices.py"), "--streams", "2",
         "--seconds", "1", "--out", str(out)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    entry = json.loads(out.read_text())
    rows = entry["results"]["rows"]
    assert {row["part"] for row in rows if row["used"]} == {"HTTP", "frame", "event"}
    assert all(row["per_second"] > 0 and row["us"] > 0 for row in rows)
    from bench.report import server_tables

    assert server_tables.choices(entry).count("**") == 6


def test_a_front_behind_a_mock_engine_becomes_a_record(tmp_path):
    options = ("--streams", "4", "--rates", "50")
    entry = bench("server_front.py", tmp_path / "front.json", *options)
    (row,) = entry["results"]["rows"]
    assert row["events_per_second"] > 100 and row["tokens_per_event"] < 1.3
