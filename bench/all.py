"""Run the benchmarks of ours whose records are missing, stale or cut off, one after the other.

    python bench/all.py [NAME ...] [--seconds 1800] [--again] [--list]

NAME is a record's, as `python -m bench.report --records` lists them. With --seconds nothing is
begun that took longer when it was last measured than is left, and what is running at the end is
interrupted: a record that was complete stays then, and those that were cut off come last in the
next call. --again measures what is current too, and --list says what would run. A benchmark that
fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time

from arguments import main
from report.layout import read

from gpt2cupy import record
from gpt2cupy.errors import InputError

SIZES = "--model 124M,355M,774M,1558M --dtype float16"
OUT = "--out bench/results"
# A record -> the script that makes it; what most documents are made from comes first.
COMMANDS = {
    "gpu-tests": "tools/gpu_test.py -p no:benchmark -n auto",
    "generate": "bench/generate.py",
    "server": "bench/server.py",
    "layers": "bench/layers.py",
    "ops": "bench/ops.py",
    "attention": "bench/attention.py",
    "call-cost": "bench/call_cost.py",
    "decode": "bench/decode.py",
    "batches": "bench/batches.py",
    "prefill": "bench/prefill.py",
    "startup": "bench/startup.py",
    "batch": "bench/batch.py",
    "arrivals": "bench/arrivals.py",
    "scoring": "bench/scoring.py",
    "prefixes": "bench/prefixes.py",
    "speculation": "bench/speculation.py",
    "server-front": "bench/server_front.py",
    "server-choices": "bench/server_choices.py",
    "decode-sizes": f"bench/decode.py {SIZES} --batch 1,4 --gemv ours {OUT}/decode-sizes.json",
    "decode-int8": f"bench/decode.py {SIZES} --batch 1,16 --quantize int8 --decode graph "
    f"{OUT}/decode-int8.json",
    "gemv": "bench/gemv.py",
    "invariance": "bench/invariance.py",
    "validate": "bench/validation.py --model 124M",
    "soak": "bench/soak.py",
    "ablation": "bench/ablation.py",
}


def reason(name: str) -> str:
    """Why a record has to be made; nothing if it has not."""
    path = record.RESULTS / f"{name}.json"
    if not path.is_file():
        return "missing"
    found = read(path)
    if not record.is_complete(found):
        return "cut off"
    return "" if record.is_current(found) else "stale"


def took(name: str) -> float:
    """Seconds that it took when it was last measured, to its end or not; 0 if nobody knows."""
    path = record.RESULTS / f"{name}.json"
    return float(read(path).get("seconds", 0)) if path.is_file() else 0.0


def run_one(name: str, seconds: float | None) -> str:
    """Run a benchmark; what became of it."""
    path = record.RESULTS / f"{name}.json"
    before = path.read_bytes() if path.is_file() else None
    script, *options = shlex.split(COMMANDS[name])
    command = [sys.executable, str(record.ROOT / script), *options]
    process = subprocess.Popen(command, cwd=record.ROOT, start_new_session=True)
    try:
        code = process.wait(seconds)
        return "done" if code == 0 else f"failed with exit status {code}"
    except subprocess.TimeoutExpired:
        # A benchmark writes what it has, marked as cut off.
        _send(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        return "interrupted"
    finally:
        _send(process, signal.SIGKILL)  # also what it may have left on the GPU
        process.wait()
        if before and record.is_complete(json.loads(before)) and not record.is_complete(read(path)):
            path.write_bytes(before)


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    """A signal to a process and those that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--seconds", type=float, help="how long all of it may take")
    parser.add_argument("--again", action="store_true", help="what is current too")
    parser.add_argument("--list", action="store_true", help="only say what would run")
    args = parser.parse_args()
    if unknown := [name for name in args.names if name not in COMMANDS]:
        raise InputError(
            f"there is no benchmark for a record {unknown[0]!r}",
            where="NAME",
            remedy=f"Name some of {', '.join(COMMANDS)}.",
        )
    # A shell that starts this in the background has it ignored, and so would the benchmarks.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    end = None if args.seconds is None else time.monotonic() + args.seconds
    found = {}
    for name in sorted(args.names or COMMANDS, key=lambda name: reason(name) == "cut off"):
        why = reason(name) or ("current" if args.again else "")
        if not why:
            continue
        known = f", {took(name):.0f} s" if took(name) else ""
        print(f"== {name}: {why}{known}", flush=True)
        if args.list:
            continue
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= took(name):
            found[name] = f"not begun: {max(left, 0):.0f} s are left"
        else:
            found[name] = run_one(name, left)
        print(f"== {name}: {found[name]}", flush=True)
    if any(each != "done" for each in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main(run)
