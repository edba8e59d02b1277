"""Ops of gpt2cupy.ops beside PyTorch, eager and compiled, on the same GPU in the same run.

    python bench/ops.py --op rms_norm --shape 1,1,4096 --dtype float16 [--out FILE]

Several ops and dtypes are separated by commas, several shapes by colons. Needs PyTorch with
CUDA (extra parity). Three ways of calling: from Python, one call after the other; a CUDA
graph of one call, replayed; and the GPU's time alone, a node of a graph of many calls. The
last is measured with a warm L2 cache and with a cold one: every node then reads arrays of
its own, and all are pushed out before. PyTorch runs under inference_mode. A result outside
the error rule has no speed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from arguments import chosen, main, names, parsed, parser
from shared import DTYPES, Kept

from gpt2cupy.errors import InputError

# What imports PyTorch lies there.
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

DEFAULT = "1,1,4096:4,1,4096:8,1,4096"
OPS = (
    "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "gelu", "gelu_erf", "bias_gelu",
    "silu_mul", "rope", "softmax", "sample_logits",
)  # fmt: skip


def shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, names(part))) for part in text.split(":")]


def line(row: dict[str, Any]) -> str:
    title = f"{row['op']} {'x'.join(map(str, row['shape']))} {row['dtype']}"
    parts = []
    for name in ("ours", "ours_torch", "eager", "compiled"):
        side = row[name]
        if side["python"] is None:
            parts.append(f"{name} OUTSIDE THE RULE {side}")
            continue
        ways = "/".join(
            f"{side[w]['p50_us']:.2f}" for w in ("python", "graph", "gpu_warm", "gpu_cold")
        )
        error = f" err {side['max_error']:.1e}" if "max_error" in side else ""
        parts.append(f"{name} {ways}{error}")
    rate = row["bytes"] / row["copy"]["p50_us"] / 1e3
    share = ""
    if row["ours"]["gpu_cold"]:
        share = f" share {row['copy']['p50_us'] / row['ours']['gpu_cold']['p50_us']:.2f}"
    copy = f"copy {row['copy']['p50_us']:.2f} ({rate:.0f} GB/s){share}"
    return f"{title}: {'; '.join(parts)}; {copy}"


def run() -> None:
    options = parser(__doc__, "ops.json", devices=("cuda",))
    options.add_argument("--op", type=names, default=["rms_norm"])
    options.add_argument("--shape", type=shapes, default=shapes(DEFAULT))
    options.add_argument("--dtype", type=names, default=["float16"])
    options.add_argument("--runs", type=int, default=100)
    args = parsed(options)
    chosen(args.op, OPS, "op")
    chosen(args.dtype, DTYPES, "dtype")
    try:
        from op_timing import all_ops
    except ImportError as error:
        raise InputError(
            f"PyTorch cannot be imported: {error}",
            where="bench/ops.py",
            remedy="Install the extra parity.",
        ) from error
    with Kept(args.out, {}, gpu=True) as kept:
        for row in all_ops(args.op, args.shape, args.dtype, args):
            kept.rows.append(row)
            print(line(row), flush=True)


if __name__ == "__main__":
    main(run)
