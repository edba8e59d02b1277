"""What `make sanitize` runs on a GPU meets every kernel, and is short."""

from __future__ import annotations

import os
import subprocess
import sys

from kernel_entries import kernel_entries

from gpt2cupy.record import ROOT

LISTED = [
    line
    for line in (ROOT / "tests" / "sanitized.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def test_every_kernel_is_launched_by_a_listed_test(tmp_path):
    out = tmp_path / "launched"
    options = ["-q", "-p", "launch_recorder", "--launched", str(out), "-p", "no:cacheprovider"]
    here = os.pathsep.join(
        [str(ROOT / "tests" / "support"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    )
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *LISTED],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": here.rstrip(os.pathsep)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert f"{len(LISTED)} passed" in ran.stdout
    launched = {tuple(line.split()) for line in out.read_text(encoding="utf-8").splitlines()}
    assert launched == kernel_entries()


def test_the_list_is_short():
    """A second or less each: a tool ends within minutes."""
    assert len(LISTED) == len(set(LISTED)) <= 110
