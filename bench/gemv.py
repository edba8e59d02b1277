"""GEMV: our kernel beside cuBLAS, and both beside the memory roofline.

    python bench/gemv.py [--model 124M,355M,774M,1558M] [--dtype float16,...] [--out FILE]

Every shape of a layer, and the logits. Calls go round many copies of the weights,
more than twice what the L2 cache holds, so that each reads from memory as in a
decode step; they are captured in a graph, one after another without overlap, so that no
launch from Python is timed. The memory roofline is a kernel that only reads the weights,
measured in the same way over the same copies. The bare GEMV is timed; in the model ours
also adds bias, activation and residual in the same launch, cuBLAS needs a second one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from arguments import chosen, main, names, parsed, parser
from shared import DTYPES, SIZES, Kept, Reader, config_of, fill

from gpt2cupy import GPT2Config
from gpt2cupy.errors import InputError
from gpt2cupy.loading import resolve_dtype
from gpt2cupy.timing import Timing, device_times

BACKENDS = ("ours", "cublas")


def shapes(config: GPT2Config) -> dict[str, tuple[int, int, bool]]:
    """(outputs M, inputs K, whether the output is float32) of each product of a step."""
    c, f = config.n_embd, config.inner_size
    return {
        "qkv": (3 * c, c, False),
        "proj": (c, c, True),
        "fc": (f, c, False),
        "out": (c, f, True),
        "logits": (config.padded_vocab_size, c, True),
    }


def captured(call: Callable[[], Any], stream: Any) -> Callable[[], None]:
    """What ``call`` queues, as one launch of a graph."""
    call()  # compiles, and chooses algorithms
    stream.synchronize()
    stream.begin_capture()
    try:
        call()
    finally:
        graph = stream.end_capture()
    return lambda: graph.launch(stream)


def measure(m: int, k: int, wide: bool, dtype: str, reader: Reader, runs: int) -> dict[str, Any]:
    import cupy

    from gpt2cupy.ops.linear import gemv

    held = resolve_dtype(dtype, np.dtype(np.float32), "cuda")
    size = m * k * held.itemsize
    cache = cupy.cuda.Device().attributes["L2CacheSize"]
    copies = max(4, -(-2 * cache // size))
    weights = cupy.empty((copies, m, k), held)
    fill(weights)
    each = [weights[i] for i in range(copies)]
    x = cupy.zeros((1, k), held)
    out = cupy.empty((1, m), np.float32 if wide else held)
    stream = cupy.cuda.get_current_stream()

    def per_call(call: Callable[[Any], Any]) -> dict[str, Any]:
        graph = captured(lambda: [call(weight) for weight in each], stream)
        whole = device_times(graph, runs=runs, warmup=2)
        parts = (whole.median_us, whole.p10_us, whole.p90_us)
        return Timing(*(us / copies for us in parts), runs).as_dict()

    figures: dict[str, Any] = {"bytes": size, "copies": copies, "read": per_call(reader.read)}
    for backend in BACKENDS:
        figures[backend] = per_call(
            lambda weight, backend=backend: gemv(x, weight, out=out, backend=backend)
        )
    return figures


def run() -> None:
    options = parser(__doc__, "gemv.json")
    options.add_argument("--model", type=names, default=list(SIZES))
    options.add_argument("--dtype", type=names, default=list(DTYPES))
    options.add_argument("--runs", type=int, default=20)
    args = parsed(options)
    chosen(args.dtype, DTYPES, "dtype")
    if args.device == "cpu":
        raise InputError(
            "this compares two GPU backends", where="--device", remedy="Run it on a GPU."
        )
    configs = {size: config_of(size) for size in args.model}
    import cupy

    with Kept(args.out, {}, gpu=True) as kept, cupy.cuda.Stream(non_blocking=True):
        reader = Reader()
        for size, config in configs.items():
            for dtype in args.dtype:
                for name, (m, k, wide) in shapes(config).items():
                    row = {"model": size, "dtype": dtype, "shape": name, "m": m, "k": k}
                    row |= measure(m, k, wide, dtype, reader, args.runs)
                    kept.rows.append(row)
                    print(line(row), flush=True)
                    cupy.get_default_memory_pool().free_all_blocks()


def line(row: dict[str, Any]) -> str:
    figures = []
    for name in (*BACKENDS, "read"):
        us = row[name]["median_us"]
        share = row["read"]["median_us"] / us
        figures.append(f"{name} {us:.2f} us {row['bytes'] / us / 1e3:.0f} GB/s {share:.0%}")
    title = f"{row['model']} {row['dtype']} {row['shape']} {row['m']} x {row['k']}"
    return f"{title}: {', '.join(figures)}"


if __name__ == "__main__":
    main(run)
