"""What a call costs: each op with ``out=`` beside CuPy's bare launches of the same kernels.

    python bench/call_cost.py [--op rms_norm,...] [--runs 50]

The bare launch is RawKernel with the same arguments, as a user of CuPy would write it.
Arrays are small, so the host is what is timed: calls back to back, then one wait.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import chosen, main, names, parsed, parser
from shared import Kept

sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

from op_cases import CASES

SHAPES = {"rope": (4, 8, 64)}
SHAPE = (4, 768)
CALLS = 200  # of a run


def per_call(calls: dict[str, Callable[[], Any]], runs: int) -> dict[str, dict[str, float]]:
    """Times of each, the runs of both in turn: what slows the processor slows both."""
    import cupy

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(runs + 2):
        for name, call in calls.items():
            cupy.cuda.get_current_stream().synchronize()
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            seconds[name].append((time.perf_counter() - start) / CALLS)
    us = {name: np.asarray(each[2:]) * 1e6 for name, each in seconds.items()}
    return {
        name: {"median_us": float(np.median(each)), "p90_us": float(np.percentile(each, 90))}
        for name, each in us.items()
    }


def measure(name: str, runs: int) -> dict[str, Any]:
    import cupy

    from gpt2cupy.ops.core.tape import recorded

    case, shape = CASES[name], SHAPES.get(name, SHAPE)
    host = case.inputs(np.random.default_rng(0), shape)
    arrays = [cupy.asarray(a) for a in host]
    out = [cupy.empty(s, kind or arrays[0].dtype) for s, kind in case.outputs(*arrays)]
    with recorded() as launches:
        case.ours(arrays, out)

    for launch in launches:
        launch.load()

    def bare() -> None:
        for launch in launches:
            launch.function(launch.grid, launch.block, launch.values, shared_mem=launch.shared)

    row: dict[str, Any] = {"op": name, "shape": list(shape), "launches": len(launches)}
    row |= per_call({"bare": bare, "ours": lambda: case.ours(arrays, out)}, runs)
    row["above_us"] = row["ours"]["median_us"] - row["bare"]["median_us"]
    return row


def run() -> None:
    options = parser(__doc__, "call-cost.json", devices=("cuda",))
    options.add_argument("--op", type=names, default=list(CASES))
    options.add_argument("--runs", type=int, default=50)
    args = parsed(options)
    chosen(args.op, CASES, "op")
    with Kept(args.out, {"shape": list(SHAPE)}, gpu=True) as kept:
        for name in args.op:
            row = measure(name, args.runs)
            kept.rows.append(row)
            print(
                f"{name}: ours {row['ours']['median_us']:.2f} us, bare "
                f"{row['bare']['median_us']:.2f} us, above {row['above_us']:+.2f} us",
                flush=True,
            )


if __name__ == "__main__":
    main(run)
