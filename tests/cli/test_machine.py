"""gpt2cupy info and gpt2cupy compile."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from command import CPU, PLAIN_ENV, call, cli, done, on_terminal

import gpt2cupy
from gpt2cupy.inspect import info
from gpt2cupy.record import ROOT


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


def test_info_names_what_would_run():
    shown = done("info", *CPU)
    for label in (
        "versions",
        "device",
        "kernel cache",
        "weights",
        "norm shifts",
        "cache",
        "decode state",
    ):
        assert re.search(rf"^{label} ", shown, re.MULTILINE), label


def test_info_as_json(lm):
    facts = json.loads(done("info", *CPU, "--json"))
    assert facts["versions"]["gpt2cupy"] == gpt2cupy.__version__
    assert facts["device"] == {"kind": "cpu", "reason": "asked for"}
    assert facts["model"]["n_layer"] == lm.config.n_layer
    assert facts["model"]["dtype"] == "float32" and facts["model"]["stored_dtype"] == "float16"
    assert facts["memory"]["weights"] == lm.model.weights.nbytes


def test_info_shows_what_auto_chose_from(monkeypatch):
    found = SimpleNamespace(
        times=lambda model, rows: {"persistent": 10.0 * rows, "graph": 12.4 * rows},
        usable=lambda model, rows: ["graph", "persistent"] if rows < 4 else ["graph"],
    )
    monkeypatch.setattr(info, "decode", found)
    shown = done("info", *CPU)
    assert "step of 1        persistent 10 us, graph 12 us (the first is taken; measured" in shown
    assert "step of 2        persistent 20 us, graph 25 us" in shown and "step of 4" not in shown
    facts = json.loads(done("info", *CPU, "--json"))
    assert facts["decode_times"]["2"] == {"persistent": 20.0, "graph": 24.8}


def without_cupy(*arguments: str) -> subprocess.CompletedProcess[str]:
    code = (
        "import sys; sys.modules['cupy'] = None; sys.argv[0] = 'gpt2cupy'\n"
        "from gpt2cupy.cli import main; main()"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT
    )


def test_info_needs_no_cupy():
    shown = without_cupy("info")
    assert shown.returncode == 0 and shown.stderr == ""
    assert "cpu (CuPy is not installed)" in shown.stdout


@pytest.mark.parametrize("arguments", [("info", "--kernels"), ("compile",)])
def test_what_needs_cupy_says_so(arguments):
    failed = without_cupy(*arguments)
    assert failed.returncode == 1 and failed.stdout == ""
    assert "CuPy is not installed" in failed.stderr and failed.stderr.count("\n") == 1


def test_info_kernels_without_a_gpu():
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.ops.core import cuda_source, variants

    arguments = ("info", "--kernels", "--arch", "sm_90", "--dtype", "float16")
    rows = [json.loads(line) for line in done(*arguments, "--json").splitlines()]
    assert {"embedding", "layer_norm", "sample"} <= {row["entry"] for row in rows}
    # What this chip does not launch stands in the list of another.
    half = {"ELEM": "__half", "HS": "64", "K": "256", "BATCH": "1"}
    launched = {each for each in cuda_source.sources() if variants.launched(each, half, "sm_90")}
    assert {row["source"] for row in rows} == launched
    assert "attention_wgmma.cu" in launched and "attention_mma.cu" not in launched
    assert {row["macros"].get("HS", "64") for row in rows} == {"64"}
    assert {row["macros"].get("K", "256") for row in rows} == {"256", "1024"}
    for row in rows:
        name = row["entry"]
        assert row["arch"] == "sm_90" and 0 < row["registers"] <= 255
        assert row["local_bytes"] == 0, f"{name} spills"
        if row["threads"] is None:
            # Plainer versions, for readers; everything else must say how it is launched.
            plainer = ("layer_norm_naive", "gemv_naive", "gemv", "attention_naive")
            assert name.removesuffix("_f32") in plainer
        else:
            assert row["blocks_per_sm"] > 0 and 0 < row["occupancy"] <= 1
    table = done(*arguments).splitlines()
    assert table[0].split()[0] == "sm_90" and "registers" in table[0]
    for line, row in zip(table[1:-2], rows, strict=True):
        numbers = [str(row[key]) for key in ("registers", "local_bytes", "shared_bytes")]
        sizes = [f"{key}={value}" for key, value in row["macros"].items() if key != "ELEM"]
        assert line.split()[:-3] == [f"{row['source']}:", row["entry"], *sizes, *numbers]
        share = "-" if row["occupancy"] is None else f"{row['occupancy']:.0%}"
        assert line.split()[-1] == share


def test_kernels_differ_by_dtype_and_architecture():
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")

    def registers(arch, dtype):
        rows = done("info", "--kernels", "--arch", arch, "--dtype", dtype, "--json").splitlines()
        return [json.loads(line)["registers"] for line in rows]

    half = registers("sm_90", "float16")
    assert half != registers("sm_75", "float16") and half != registers("sm_90", "float32")


def test_info_kernels_of_an_unknown_architecture():
    code, _, err = call("info", "--kernels", "--arch", "sm_123")
    assert code == 2 and "sm_123" in err and "sm_90" in err


@pytest.mark.parametrize("arch", ["foo", "sm_70", "sm_99", "sm_123", "sm_750"])
def test_compile_refuses_an_unknown_architecture(arch):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    code, out, err = call("compile", "--arch", "sm_90", "--arch", arch)
    words = " ".join(re.sub("[^\\w',;-]", " ", err).split())
    assert (code, out) == (2, "") and "NVRTC" not in err
    assert f"'{arch}' is no architecture; it is one of sm_75, sm_80," in words


def test_compile_takes_what_only_nvrtc_knows(monkeypatch, tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.ops.core import compiler

    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    binding = SimpleNamespace(getVersion=lambda: (14, 0), getSupportedArchs=lambda: (75, 130))
    monkeypatch.setattr(compiler, "nvrtc", lambda: binding)
    monkeypatch.setattr(compiler, "compile_source", lambda source, options: b"cubin")
    monkeypatch.setattr(compiler, "in_processes", contextlib.nullcontext)
    # sm_121 is among ours: there an older NVRTC names the one that is needed.
    for arch in ("sm_130", "sm_130a", "sm_121"):
        assert f"cubins for {arch} in" in done("compile", "--arch", arch)
    assert call("compile", "--arch", "sm_131")[0] == 2


def test_compile_says_what_nvrtc_says(tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    environment = PLAIN_ENV | {"GPT2CUPY_CACHE_DIR": str(tmp_path)}
    failed = cli("compile", "--arch", "sm_75a", env=environment)
    assert failed.returncode == 1 and failed.stderr.count("\n") == 1, "no bar without a terminal"
    assert failed.stderr.startswith("gpt2cupy: NVRTC")
    assert not list(tmp_path.iterdir())


def test_compile_shows_a_bar_on_a_terminal(tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    environment = PLAIN_ENV | {"GPT2CUPY_CACHE_DIR": str(tmp_path)}
    code, shown = on_terminal("compile", "--arch", "sm_75a", env=environment)
    assert code == 1 and re.search(r"0%\|.*\| 0/\d+ ", shown)
    assert re.search(r"\n[^\n]*gpt2cupy:[^\n]* NVRTC", shown), "the error has a line of its own"


@pytest.mark.parametrize("arguments", [(), ("--ops",)])
def test_compile_counts_what_it_made(monkeypatch, tmp_path, arguments):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.ops.core import compiler, variants

    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_source", lambda source, options: b"cubin")
    monkeypatch.setattr(compiler, "in_processes", contextlib.nullcontext)
    shown = done("compile", "--arch", "sm_80", "--arch", "sm_90", *arguments)
    made = [path.name.rsplit("-", 2) for path in tmp_path.iterdir()]
    assert shown == f"{len(made)} cubins for sm_80, sm_90 in {tmp_path}\n"
    # Without --ops neither what no model launches, nor other heads than those of 64 channels.
    sizes = variants.FAST_HEAD_SIZES if arguments else (64,)
    for arch in ("sm_80", "sm_90"):
        wanted = [
            source.removesuffix(".cu")
            for source, defines in variants.variants(sizes)
            if variants.launched(source, defines, arch)
            and (arguments or source not in variants.OPS_ALONE)
        ]
        assert sorted(name for name, of, _ in made if of == arch) == sorted(wanted)


def test_compile_for_one_model(monkeypatch, tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.ops.core import compiler

    seen = []
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(
        compiler, "compile_source", lambda source, options: seen.append(options) or b"cubin"
    )
    monkeypatch.setattr(compiler, "in_processes", contextlib.nullcontext)
    shown = done("compile", "--model", "shakespeare", "--arch", "sm_90")
    assert shown.startswith(f"{len(seen)} cubins for sm_90 in")
    macros = {option for options in seen for option in options if option.startswith("-D")}
    assert {m for m in macros if m[2:4] in ("HS", "K=")} == {"-DHS=64", "-DK=256", "-DK=1024"}
    code, _, err = call("compile", "--model", str(tmp_path / "nothing"), "--arch", "sm_90")
    assert code == 1 and "nothing" in err


def test_compile_stops_at_an_error_and_drops_the_rest(monkeypatch, tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.errors import CompileError
    from gpt2cupy.ops.core import compiler, jobs

    seen = []

    def refuse(source, options):
        if seen:
            time.sleep(0.05)  # as compiling would take: the error is seen meanwhile
        seen.append(source)
        raise CompileError("refused", where=source, remedy="none")

    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_source", refuse)
    monkeypatch.setattr(compiler, "in_processes", contextlib.nullcontext)
    monkeypatch.setattr(jobs, "threads", lambda: 1)
    monkeypatch.setattr(compiler._jobs, "_pool", None)
    code, _, err = call("compile", "--arch", "sm_90")
    assert code == 1 and "refused" in err
    deadline = time.monotonic() + 10
    while compiler._jobs._under_way and time.monotonic() < deadline:
        time.sleep(0.02)  # the one that had begun
    assert not compiler._jobs._under_way
    assert len(seen) < 100, "what had not begun was left"
