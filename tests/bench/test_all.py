"""bench/all.py: which benchmarks it runs, and what it does where time ends or one fails."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from bench.report.__main__ import SOURCES
from gpt2cupy import record

ROOT = Path(__file__).parents[2]
# Made by hand: they need other engines, the CPU, two GPUs, or another chip's tests.
OTHERS = {"cpu", "devices", "naive", "peers", "profile", "quantization", "shakespeare"}
WRITES = """
import json, signal, sys, time
from pathlib import Path
try:
    time.sleep({sleep})
except KeyboardInterrupt:
    Path("interrupted").touch()
record = {{"command": "python x.py", "date": "", "environment": {{}}, "files": {{}}, "results": 1}}
record |= {{"complete": not Path("interrupted").exists()}}
Path(sys.argv[0]).with_suffix(".json").write_text(json.dumps(record | {{"seconds": 9}}))
sys.exit({code})
"""


@pytest.fixture
def everything(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    module = importlib.import_module("all")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.chdir(tmp_path)
    yield module
    sys.modules.pop("all")


def scripts(folder, monkeypatch, module, **codes):
    """Benchmarks that end at once with these codes; None is one that takes a minute."""
    for name, code in codes.items():
        sleep, code = (60, 0) if code is None else (0, code)
        (folder / f"{name}.py").write_text(WRITES.format(sleep=sleep, code=code))
    monkeypatch.setattr(module, "COMMANDS", {name: f"{name}.py --some thing" for name in codes})


def called(module, monkeypatch, *arguments):
    """The exit status of a call."""
    monkeypatch.setattr(sys, "argv", ["all.py", *arguments])
    try:
        module.run()
    except SystemExit as ended:
        return ended.code
    return 0


def test_it_knows_the_benchmark_of_every_record():
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        commands = importlib.import_module("all").COMMANDS
    finally:
        sys.path.remove(str(ROOT / "bench"))
        sys.modules.pop("all")
    records = {name for name in SOURCES.values() if not name.startswith("gpu-tests")}
    assert records - OTHERS == commands.keys() - {"gpu-tests"}
    assert all((ROOT / each.split()[0]).is_file() for each in commands.values())


def test_what_fails_keeps_no_other_from_running(everything, monkeypatch, tmp_path, capfd):
    scripts(tmp_path, monkeypatch, everything, a=3, b=0)
    assert called(everything, monkeypatch) == 1
    assert {path.name for path in tmp_path.glob("*.json")} == {"a.json", "b.json"}
    out = capfd.readouterr().out
    assert "== a: failed with exit status 3" in out
    assert "== b: done" in out


def test_what_is_current_runs_only_again(everything, monkeypatch, tmp_path, capfd):
    scripts(tmp_path, monkeypatch, everything, a=0, b=0)
    assert called(everything, monkeypatch, "a") == 0
    assert called(everything, monkeypatch, "--list") == 0
    assert capfd.readouterr().out.splitlines()[-1] == "== b: missing"
    (tmp_path / "a.json").unlink()
    assert called(everything, monkeypatch, "--again", "b") == 0
    assert not (tmp_path / "a.json").exists()


def test_the_time_ends(everything, monkeypatch, tmp_path, capfd):
    scripts(tmp_path, monkeypatch, everything, a=0, slow=None)
    kept = {"command": "", "date": "", "environment": {}, "results": 1}
    (tmp_path / "a.json").write_text(json.dumps(kept | {"files": {"gone": ""}, "seconds": 600}))
    assert called(everything, monkeypatch, "--seconds", "1") == 1
    out = capfd.readouterr().out
    assert "== a: stale, 600 s\n== a: not begun: 1 s are left" in out
    assert "== slow: interrupted" in out
    assert (tmp_path / "interrupted").exists()
    assert json.loads((tmp_path / "slow.json").read_text())["complete"] is False
    # Then it comes last, and does not take the place of a record that was complete.
    scripts(tmp_path, monkeypatch, everything, slow=None, b=0)
    assert called(everything, monkeypatch, "--list") == 0
    assert capfd.readouterr().out == "== b: missing\n== slow: cut off, 9 s\n"
    (tmp_path / "slow.json").write_text(json.dumps(kept | {"files": {"gone": ""}}))
    assert called(everything, monkeypatch, "slow", "--seconds", "1") == 1
    assert json.loads((tmp_path / "slow.json").read_text())["files"] == {"gone": ""}


def test_an_unknown_name(everything, monkeypatch):
    with pytest.raises(everything.InputError, match="no benchmark for a record 'nothing'"):
        called(everything, monkeypatch, "nothing")
