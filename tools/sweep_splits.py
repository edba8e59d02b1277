"""Into how many parts decode_attention should split a sequence's keys: each number timed.

    python tools/sweep_splits.py [--dtype float16] [--caches 1,16384,32,32,128] [--most 32]

Caches are as bench/attention.py has them. Beside each number of parts stand microseconds and the
share of a kernel that only reads the same bytes; the op's own choice is marked. No record is made.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from arguments import chosen, main, names
from attention import CACHES, caches
from shared import DTYPES, Reader, fill

from gpt2cupy import ops
from gpt2cupy.loading import resolve_device, resolve_dtype
from gpt2cupy.ops.core.tape import without_plans
from gpt2cupy.timing import device_times

# The package has a function of this name.
module = importlib.import_module("gpt2cupy.ops.decode_attention")


def timed(arrays: list[Any], out: Any, splits: int | None, runs: int) -> tuple[float, int]:
    """Microseconds of a call, and the parts that it had."""
    own = module._splits
    try:
        if splits is not None:
            module._splits = lambda *_: splits
        module._blocks.cache_clear()
        with without_plans():
            spread = device_times(
                lambda: ops.decode_attention(*arrays, out=out), runs=runs, inner=4
            )
        shapes = arrays[0].shape, arrays[1].shape, arrays[0].dtype
        return spread.median_us, module._blocks(module.current_device(), *shapes).grid[1]
    finally:
        module._splits = own
        module._blocks.cache_clear()


def run() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--caches", type=caches, default=caches(CACHES))
    options.add_argument("--dtype", type=names, default=["float16"])
    options.add_argument("--most", type=int, default=32)
    options.add_argument("--runs", type=int, default=20)
    args = options.parse_args()
    chosen(args.dtype, DTYPES, "dtype")
    resolve_device("cuda")
    import cupy

    reader = Reader()
    for dtype in args.dtype:
        kind = resolve_dtype(dtype, np.dtype(np.float32), "cuda")
        for batch, room, heads, kv, size in args.caches:
            both = cupy.empty((2, batch, room, kv, size), kind)
            fill(both, spread=1.0)
            q = both[0, :, :1, :1].repeat(heads, axis=2)[:, 0].copy()
            arrays = [q, *both, cupy.full(batch, room, np.int32)]
            out = cupy.empty_like(q)
            memory = both.reshape(-1)
            read = device_times(lambda m=memory: reader.read(m), runs=args.runs, inner=4).median_us
            own, chosen_splits = timed(arrays, out, None, args.runs)
            print(f"{batch}x{room}x{heads}x{kv}x{size} {dtype}: a read {read:.1f} us", flush=True)
            for splits in range(1, args.most + 1):
                us, parts = timed(arrays, out, splits, args.runs)
                mark = f"  <- its choice, {own:.1f} us" if parts == chosen_splits else ""
                print(f"  {parts:3d} parts {us:8.1f} us  {read / us:.3f}{mark}", flush=True)


if __name__ == "__main__":
    main(run)
