"""Run a module as the shell would and write down what it loaded, for the record of its caller.

    python bench/traced.py LOADED.json MODULE [arguments of the module]

It is for what a benchmark measures as a process of its own (`gpt2cupy generate`).
"""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

from gpt2cupy import record


def run(module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """``python -m module`` in a process; what it loaded goes into this process's record."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "loaded.json"
        command = [sys.executable, __file__, str(out), module, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, **options)
        if out.exists():
            record.add_loaded(json.loads(out.read_text()))
    return done


def main() -> None:
    out, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    sys.path.remove(str(Path(__file__).resolve().parent))  # the module would not see bench either
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        Path(out).write_text(json.dumps(record.loaded()))


if __name__ == "__main__":
    main()
