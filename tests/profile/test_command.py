"""The command line, the trace, the picture, and errors before anything is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from builders import TINY
from command import CPU, cli
from pretended_gpu import PROMPT, SMALL, STEP, held
from typer.testing import CliRunner

from gpt2cupy import output, profile
from gpt2cupy.cli.app import app
from gpt2cupy.profile import plot, trace
from gpt2cupy.profile.measure import Session


def check_trace(found, path):
    trace.write(found, path)
    written = json.loads(path.read_text())["traceEvents"]
    slices = [each for each in written if each["ph"] == "X"]
    named = {e["tid"]: e["args"]["name"] for e in written if e["name"] == "thread_name"}
    ends = {}
    for each in sorted(slices, key=lambda e: (e["tid"], e["ts"], -e["dur"])):
        assert each["dur"] >= 0 and each["ts"] >= 0
        # Within a thread a slice lies inside the one that is open, or begins after its end.
        stack = ends.setdefault(each["tid"], [])
        end = each["ts"] + each["dur"]
        while stack and stack[-1] <= each["ts"] + 1e-6:
            stack.pop()
        assert not stack or end <= stack[-1] + 1e-6
        stack.append(end)
    return slices, named


def test_a_trace_nests(found, tmp_path):
    slices, named = check_trace(found, tmp_path / "out.json")
    assert sorted(named.values()) == ["components", "ops"]
    names = [each["name"] for each in slices]
    assert names.count("token 4") == 1 and names.count("block 1") == SMALL.tokens
    assert names.count("attention over the cache") == SMALL.tokens * TINY.n_layer
    ops_only = [each for each in slices if named[each["tid"]] == "ops"]
    assert len(ops_only) == SMALL.tokens * STEP
    assert ops_only[1]["args"]["component"] == "blocks.0/ln_1" and ops_only[1]["args"]["bytes"] > 0


def test_a_trace_of_kernels(cupti, model, tmp_path):
    slices, named = check_trace(profile.profile(model, PROMPT, SMALL), tmp_path / "out.json")
    mine = [each for each in slices if named[each["tid"]] == "kernels"]
    assert len(mine) == SMALL.tokens * (STEP + 1)
    assert {each["dur"] for each in mine} == {3.0}


def test_a_trace_of_kernels_that_overlap(cupti, model, tmp_path):
    overlapping = profile.profile(model, PROMPT, SMALL)
    timeline = overlapping.timeline
    # Kernels start while the one before still runs; one ends before that one does.
    timeline.start[:, 1:] -= 3
    timeline.end[:, 5] -= 5
    slices, named = check_trace(overlapping, tmp_path / "out.json")
    assert set(named.values()) == {"components", "kernels", "kernels, overlapping"}
    mine = [each for each in slices if "kernels" in named[each["tid"]]]
    assert len(mine) == SMALL.tokens * (STEP + 1)
    ours = [each for each in slices if named[each["tid"]] == "components"]
    tokens = [each for each in ours if each["name"].startswith("token")]
    for one, following in pairwise(tokens):
        assert one["ts"] + one["dur"] <= following["ts"] + 1e-6


def test_a_plot_is_drawn(found, tmp_path):
    pytest.importorskip("matplotlib")
    plot.draw(found.results, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["out", "out.json"])
def test_a_plot_of_no_kind(name, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(Session, "unprofiled", lambda self: pytest.fail("measured"))
    done = invoke("--plot", tmp_path / name)
    assert done.exit_code == 2 and f"{name} names no kind of picture" in done.stderr


def invoke(*options):
    quick = ["--device", "cpu", "--warmup", "0", "--runs", "1", "--tokens", "3"]
    return CliRunner().invoke(app, ["profile", *quick, *options])


def test_the_command_prints_tables():
    done = invoke("--component", "mlp")
    assert done.exit_code == 0, done.output
    parts = [
        *("3 tokens", "'What is your name' (", "0 warm-up runs", "on cpu", "attention over"),
        *("residual", "tokens/s", "kernels of mlp", "copy", "a step takes longer by"),
    ]
    assert not [part for part in parts if part not in done.output]
    after = done.output.partition("kernels of mlp")[2]
    assert "projection" in after and "lm_head" not in after


def test_the_command_prints_json_and_writes_a_trace(tmp_path):
    done = invoke("--json", "--batch", "2", "--prompt", "ROMEO:", "--trace", tmp_path / "t.json")
    assert done.exit_code == 0, done.output
    printed = json.loads(done.stdout)
    assert printed["model"] == "shakespeare" and printed["device"] == "cpu"
    settings = printed["settings"]
    assert settings["batch"] == 2 and settings["prompt"] == "ROMEO:" and settings["runs"] == 1
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--trace", "{folder}/missing/t.json"], "missing/t.json cannot be written"),
        (["--trace", "{folder}"], "cannot be written"),
        (["--plot", "{folder}/missing/t.png"], "missing/t.png cannot be written"),
        (["--component", "nothing"], "unknown component 'nothing'"),
        (["--prompt", "word " * 2000], "the context"),
        (["--tokens", "600"], "exceed the context of 512"),
        (["--runs", "0"], "--runs is 0"),
    ],
)
def test_errors_come_before_measuring(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(Session, "unprofiled", lambda self: pytest.fail("measured"))
    done = invoke(*(option.format(folder=tmp_path) for option in options))
    assert done.exit_code == (1 if "cannot be written" in message else 2)
    assert done.stderr.startswith("gpt2cupy: ") and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_checking_a_path_leaves_it_alone(tmp_path):
    output.check_writable(tmp_path / "new.json", "--trace")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.json").write_text("kept")
    output.check_writable(tmp_path / "old.json", "--trace")
    assert (tmp_path / "old.json").read_text() == "kept"


def test_a_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = invoke("--plot", tmp_path / "out.png")
    assert done.exit_code == 1 and "gpt2cupy[bench]" in done.stderr


def test_the_command_keeps_what_a_held_cupti_left(cupti, model, tmp_path, monkeypatch):
    cupti.activity_enable = held
    done = invoke("--trace", tmp_path / "t.json")
    assert done.exit_code == 1 and "CUPTI cannot be used" in done.stderr
    assert "projection" in done.stdout and (tmp_path / "t.json").exists()


needs_full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


@needs_full
def test_what_was_measured_is_kept_when_the_trace_cannot_be_written(tmp_path):
    pytest.importorskip("matplotlib")
    done = invoke("--trace", "/dev/full", "--plot", tmp_path / "out.png")
    assert done.exit_code == 1 and "tokens/s" in done.stdout
    assert "the trace cannot be written: No space left on device (/dev/full). Free" in done.stderr
    assert (tmp_path / "out.png").stat().st_size


@needs_full
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_what_was_measured_is_kept_when_stdout_cannot_be_written(options, tmp_path):
    quick = ["--warmup", "0", "--runs", "1", "--tokens", "3", "--trace", str(tmp_path / "t.json")]
    with open("/dev/full", "w") as full:
        ended = cli(
            *("profile", *CPU, *quick, *options),
            capture_output=False,
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert "the output cannot be written: No space left" in ended.stderr
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


@pytest.mark.parametrize("same", ["a.png", "sub/../a.png"])
def test_the_trace_and_the_plot_are_two_files(same, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "sub").mkdir()
    monkeypatch.setattr(Session, "unprofiled", lambda self: pytest.fail("measured"))
    done = invoke("--trace", tmp_path / same, "--plot", tmp_path / "a.png")
    assert done.exit_code == 2 and "cannot both be" in done.stderr
    assert not (tmp_path / "a.png").exists()
