"""What is compiled ahead of time for a chip is what ops launch there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from gpt2cupy.ops.core import compiler, cuda_source, variants
from gpt2cupy.record import ROOT


def chosen(arch: str, *names: str) -> list[tuple[str, dict[str, str], str]]:
    """(source, macros, entry) of tests/support/chosen_kernels.py."""
    here = [str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "chosen_kernels.py"), arch, *names],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, here))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    return [tuple(json.loads(line)) for line in ran.stdout.splitlines()]


def left_out_for_float(source: str) -> set[str]:
    """Entries between ``#if !ELEM_IS_FLOAT`` and its ``#endif``."""
    found, depth, inside = "", 0, None
    for line in cuda_source.source_text(source).splitlines():
        if line.startswith("#if"):
            depth += 1
            if "!ELEM_IS_FLOAT" in line:
                inside = depth
        elif line.startswith("#endif"):
            if inside == depth:
                inside = None
            depth -= 1
        elif inside is not None:
            found += line + "\n"
    names = re.findall(r"^[A-Z_]+_ENTRY\((\w+)|\b(\w+)\(const", found, re.MULTILINE)
    return {of_macro or written for of_macro, written in names}


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90"])
def test_what_ops_launch_is_compiled_ahead(arch):
    launches = chosen(arch)
    assert len(launches) > 40
    for source, defines, entry in launches:
        sizes = (int(defines.get("HS", 64)),), (int(defines.get("K", 64)),)
        assert (source, defines) in list(variants.variants(*sizes)), source
        assert variants.launched(source, defines, arch), (source, defines)
        if defines.get("ELEM") == "float":
            assert entry not in left_out_for_float(source), "its twin is what is compiled"


@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
def test_what_models_call_is_not_left_to_ops(arch):
    package = ROOT / "gpt2cupy"
    callers = [package / "model.py", *package.glob("decode/*.py"), *package.glob("generation/*.py")]
    names = {n for path in callers for n in re.findall(r"\bops\.(\w+)\(", path.read_text())}
    assert {"lookup", "layer_norm", "target_logprobs"} <= names
    sources = {source for source, _, _ in chosen(arch, *names)}
    # Models name the product that they want: the op's own choice is for its other callers.
    assert {"lookup.cu", "norm.cu"} <= sources - {"linear_split.cu"}
    assert not (sources - {"linear_split.cu"}) & variants.OPS_ALONE


def test_what_another_chip_launches_is_not_compiled():
    def files(arch):
        return {s for s, defines in variants.variants() if variants.launched(s, defines, arch)}

    assert {"attention.cu"} == files("sm_75") - files("sm_80") - files("sm_90")
    assert "attention_mma.cu" in files("sm_120") and "attention_mma.cu" not in files("sm_90")
    assert files("sm_90") - files("sm_120") == {
        "attention_split.cu", "attention_wgmma.cu", "linear_split.cu",
    }  # fmt: skip
    assert "decode_step.cu" in files("sm_90") - files("sm_89")
    long = {"ELEM": "__half", "K": "6400"}  # one row goes to skinny.cu
    assert variants.launched("norm_gemv.cu", long, "sm_75")
    assert not variants.launched("norm_gemv.cu", long, "sm_80")
    assert variants.launched("norm_gemv.cu", long | {"ELEM": "float"}, "sm_80")
    assert variants.launched("norm_gemv.cu", long | {"K": "4096"}, "sm_80")
    every = {source for arch in compiler.ARCHITECTURES for source in files(arch)}
    assert every == set(cuda_source.sources()) and every > variants.OPS_ALONE


def test_twins_of_float_are_left_out():
    assert left_out_for_float("norm.cu") == {"layer_norm_f32"}
    assert left_out_for_float("add_norm.cu") == {"add_layer_norm_f32"}
    assert left_out_for_float("norm_gemv.cu") == {
        "gemv_add", "gemv_add_once", "norm_gemv", "norm_gemv_once",
    }  # fmt: skip


def test_the_slowest_go_first():
    jobs = [(source, {}, "sm_90") for source in cuda_source.sources()]
    ordered = [source for source, _, _ in variants.in_order(jobs)]
    assert set(ordered[: len(variants.SLOWEST)]) == variants.SLOWEST
    assert ordered[-1] not in variants.SLOWEST and sorted(ordered) == list(cuda_source.sources())
