"""The benchmarks' scripts as the tests run them: at a tiny size, as processes."""

from __future__ import annotations

import os
import subprocess
import sys

from gpt2cupy.record import ROOT

RUNS = {
    "decode": "--dtype float32 --batch 1,2 --context 16,100 --runs 2 --tokens 6",
    "batches": "--dtype float32 --batch 1,2 --at 60 --large 3x90 --context 1,100 --runs 2",
    "prefill": "--dtype float32 --tokens 8,64 --runs 2",
    "ablation": "--dtype float32 --batch 1,2 --tokens 6 --runs 2",
    "startup": "--dtype float32 --runs 1",
    "batch": "--dtype float32 --requests 6 --prompt 8 --tokens 4 --max-batch 4 --runs 1",
    "scoring": "--dtype float32 --pairs 6 --context 10 --continuation 3 --runs 1",
    "invariance": "--dtype float32 --batch 1,2 --context 16 --tokens 8,64 --runs 2",
}


def bench(script: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user in another folder does."""
    command = [sys.executable, ROOT / "bench" / f"{script}.py", *options]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path} | environment
    return subprocess.run(command, capture_output=True, text=True, env=environment)
