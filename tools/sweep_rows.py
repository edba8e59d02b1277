"""How many warps or blocks a row of a norm or a softmax should have: each number timed.

    python tools/sweep_rows.py [--op layer_norm,rms_norm,softmax] [--rows 8,64,128,65536]
                               [--channels 768] [--x float32] [--dtype float16]

Of norms it is the warps of a row, of softmax the blocks that share one. --x is the dtype of what is
normalised: float32 is a model's residual stream. A figure is µs of a launch in a graph of many,
whose kernels overlap as those of a decode step do; the op's own choice is marked. No record is
made.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from arguments import chosen, main, names, numbers
from shared import DTYPES, fill

from gpt2cupy import ops
from gpt2cupy.decode.graph import captured
from gpt2cupy.loading import resolve_device, resolve_dtype
from gpt2cupy.ops.core.tape import recorded
from gpt2cupy.timing import device_times

norm, softmax = (importlib.import_module(f"gpt2cupy.ops.{name}") for name in ("norm", "softmax"))
NORMS = ("layer_norm", "rms_norm")
WARPS, BLOCKS = (1, 2, 4, 8, 16), tuple(softmax.SOFTMAX)
NODES_US = 2000  # of a graph, about
Blocks = Callable[..., Any]


def warps_of(number: int) -> Blocks:
    """In place of norm._blocks: so many warps for every row."""

    def blocks(shape: tuple[int, ...], *_: Any) -> Any:
        if number == 1:
            return (-(-shape[0] // norm._ROWS),), (norm._WARP, norm._ROWS)
        return (shape[0],), (number * norm._WARP, 1)

    return blocks


def parts_of(number: int) -> Blocks:
    """In place of softmax._blocks: so many blocks for every row."""

    def blocks(device: int, shape: tuple[int, ...], itemsize: int) -> Any:
        share = -(-shape[1] // number) + 16 // itemsize
        wanted = -(-share // (32 * softmax._HELD[number])) * 32
        return number, (shape[0] * number,), (min(softmax._MOST[number], wanted),)

    return blocks


def timed(call: Callable[[], Any]) -> float:
    """Microseconds of a call's launches, one after the other in a graph."""
    with recorded() as calls:
        call()
    once = device_times(captured(calls * 2), runs=5).median_us / 2
    nodes = int(max(2, min(200, NODES_US // max(once, 1.0))))
    return device_times(captured(calls * nodes), runs=20).median_us / nodes


def swept(module: Any, choices: dict[int, Blocks], call: Callable[[], Any]) -> str:
    """The op's own time, and that of each choice."""
    own = module._blocks
    found = [f"own {timed(call):.2f}"]
    try:
        for number, blocks in choices.items():
            module._blocks = blocks
            found.append(f"{number}: {timed(call):.2f}")
    finally:
        module._blocks = own
    return ", ".join(found)


def measure(op: str, rows: int, channels: int, of_x: Any, of_weight: Any) -> str:
    """An op's times on so many rows."""
    import cupy

    x = cupy.empty((rows, channels), of_weight if op == "softmax" else of_x)
    fill(x, spread=1.0)
    out = cupy.empty(x.shape, of_weight)
    if op == "softmax":
        choices = {number: parts_of(number) for number in BLOCKS}
        return swept(softmax, choices, lambda: ops.softmax(x, out=out))
    given = [x, *cupy.ones((2 if op == "layer_norm" else 1, channels), of_weight)]
    choices = {number: warps_of(number) for number in WARPS}
    return swept(norm, choices, lambda: getattr(ops, op)(*given, out=out))


def run() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--op", type=names, default=["layer_norm"])
    options.add_argument("--rows", type=numbers, default=[8, 16, 32, 64, 128, 512])
    options.add_argument("--channels", type=numbers, default=[768, 1600])
    options.add_argument("--x", default="float32")
    options.add_argument("--dtype", default="float16")
    args = options.parse_args()
    chosen(args.op, (*NORMS, "softmax"), "op")
    chosen([args.x, args.dtype], DTYPES, "dtype")
    resolve_device("cuda")
    kinds = [resolve_dtype(each, np.dtype(np.float32), "cuda") for each in (args.x, args.dtype)]
    for op, channels, rows in itertools.product(args.op, args.channels, args.rows):
        print(f"{op} {rows}x{channels}: {measure(op, rows, channels, *kinds)} µs", flush=True)


if __name__ == "__main__":
    main(run)
