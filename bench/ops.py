"""Ops of gpt2cupy.ops beside PyTorch, eager and compiled, on the same GPU in the same run.

    python bench/ops.py [--op rms_norm --shape 1,1,4096 --dtype float16] [--out FILE]

Without --op, --shape and --dtype it measures the cases of docs/rows.md. Several ops and dtypes
are separated by commas, several shapes by colons. Needs PyTorch with CUDA (extra parity). Three
ways of calling: from Python, one call after the other; a CUDA graph of one call, replayed; and
the GPU's time alone, a node of a graph of many calls. The last is measured with a warm L2 cache
and with a cold one: every node then reads arrays of its own, and all are pushed out before.
PyTorch runs under inference_mode. A result outside the error rule has no speed.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from arguments import chosen, main, names, parsed, parser
from shared import DTYPES, Kept

from gpt2cupy.errors import InputError

# What imports PyTorch lies there.
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

OPS = (
    "rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm", "gelu", "gelu_erf", "bias_gelu",
    "silu_mul", "rope", "softmax", "sample_logits",
)  # fmt: skip
Shape = tuple[int, ...]
ONE: dict[str, Any] = {"op": ["rms_norm"], "shape": [(1, 1, 4096)], "dtype": ["float16"]}
# What docs/rows.md shows: ops, shapes and dtypes.
PARTS: list[tuple[tuple[str, ...], list[Shape], tuple[str, ...]]] = [
    (("rms_norm",), [(1, 1, 4096), (4, 1, 4096), (8, 1, 4096)], ("float16", "bfloat16", "float32")),
    (("layer_norm", "add_rms_norm", "add_layer_norm"), [(1, 4096), (8, 4096)], ("float16",)),
    (("rms_norm", "layer_norm"), [(4096, 4096), (65536, 4096)], ("float16", "bfloat16")),
    (("add_rms_norm", "add_layer_norm"), [(4096, 4096), (65536, 4096)], ("float16",)),
    (("softmax", "sample_logits"), [(1, 50257), (8, 50257), (64, 50257)], ("float16",)),
    (("gelu", "gelu_erf", "bias_gelu", "silu_mul"), [(4096, 11008)], ("float16",)),
    (("rope",), [(4096, 32, 128)], ("float16",)),
]


def shapes(text: str) -> list[Shape]:
    return [tuple(map(int, names(part))) for part in text.split(":")]


def cases(args: Any) -> list[tuple[str, Shape, str]]:
    """Op, shape and dtype of each row."""
    given = {name: getattr(args, name) for name in ONE}
    parts = PARTS
    if any(given.values()):
        parts = [tuple(given[name] or ONE[name] for name in ONE)]  # type: ignore[list-item]
    return [case for ops, of, kinds in parts for case in itertools.product(ops, of, kinds)]


def line(row: dict[str, Any]) -> str:
    title = f"{row['op']} {'x'.join(map(str, row['shape']))} {row['dtype']}"
    parts = []
    for name in ("ours", "ours_torch", "eager", "compiled"):
        side = row[name]
        if side["python"] is None:
            parts.append(f"{name} {side.get('failed') or f'OUTSIDE THE RULE {side}'}")
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
    options.add_argument("--op", type=names)
    options.add_argument("--shape", type=shapes)
    options.add_argument("--dtype", type=names)
    options.add_argument("--runs", type=int, default=50)
    args = parsed(options)
    chosen(args.op or [], OPS, "op")
    chosen(args.dtype or [], DTYPES, "dtype")
    try:
        from op_timing import all_ops
    except ImportError as error:
        raise InputError(
            f"PyTorch cannot be imported: {error}",
            where="bench/ops.py",
            remedy="Install the extra parity.",
        ) from error
    with Kept(args.out, {}, gpu=True) as kept:
        for row in all_ops(cases(args), args):
            kept.rows.append(row)
            print(line(row), flush=True)


if __name__ == "__main__":
    main(run)
