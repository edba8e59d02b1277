"""Attention of gpt2cupy.ops beside PyTorch's, on the same GPU in the same run.

    python bench/attention.py --tokens 512,4096 --dtype float16 [--out FILE]

Every backend of scaled_dot_product_attention that takes a case is timed; the fastest is what
ours is compared with (TF32 is off). Compiled it calls the same kernels. Timed are calls from
Python and the GPU alone, with keys and values in L2 and not. A result outside the error rule
has no speed. Attention of one token over a cache is timed beside a kernel that only reads
the same bytes. Needs PyTorch with CUDA (extra parity).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from arguments import chosen, main, names, numbers, parsed, parser
from shared import DTYPES, Kept

from gpt2cupy.errors import InputError

# What imports PyTorch lies there.
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

# Sequences, tokens of room, query heads, key heads, channels: a cache of more than 256 MB each.
CACHES = (
    "1,16384,32,32,128:8,4096,32,32,128:16,8192,12,12,64:64,1024,32,32,128:1,65536,64,8,128:"
    "16,8192,64,8,128:64,4096,64,8,128"
)


def caches(text: str) -> list[tuple[int, ...]]:
    return [tuple(map(int, names(part))) for part in text.split(":") if part]


def speed(row: dict[str, Any]) -> str:
    """A row of many queries in a line."""
    title = f"{row['tokens']} {row['dtype']} {'causal' if row['causal'] else 'full'}"
    ours, best = row["ours"], row["sdpa"][row["best"]]
    if ours["gpu_warm"] is None:
        return f"{title}: OUTSIDE THE RULE {ours}"
    mine, theirs = ours["gpu_warm"]["p50_us"], best["gpu_warm"]["p50_us"]
    return (
        f"{title}: {row['best']} {theirs:.1f} us, ours {mine:.1f} us "
        f"({row['flops'] / mine / 1e6:.0f} TFLOP/s, {theirs / mine:.2f} x), "
        f"errors {ours['max_error']:.1e} / {best['max_error']:.1e}"
    )


def share(row: dict[str, Any]) -> str:
    """A row of one query in a line."""
    title = "x".join(map(str, row["cache"]))
    ours = row["ours"]["gpu"]
    if ours is None:
        return f"decode {title} {row['dtype']}: OUTSIDE THE RULE {row['ours']}"
    return (
        f"decode {title} {row['dtype']}: {ours['p50_us']:.1f} us, "
        f"{row['read']['p50_us'] / ours['p50_us']:.3f} of a read, PyTorch "
        f"{row['sdpa']['gpu']['p50_us']:.1f} us"
    )


def run() -> None:
    options = parser(__doc__, "attention.json", devices=("cuda",))
    options.add_argument("--tokens", type=numbers, default=[512, 1024, 2048, 4096])
    options.add_argument("--heads", type=int, default=32)
    options.add_argument("--head-size", type=int, default=128)
    options.add_argument("--batch", type=int, default=1)
    options.add_argument("--caches", type=caches, default=caches(CACHES))
    options.add_argument("--dtype", type=names, default=list(DTYPES))
    options.add_argument("--runs", type=int, default=20)
    args = parsed(options)
    chosen(args.dtype, DTYPES, "dtype")
    try:
        from attention_timing import one_token, sequences
    except ImportError as error:
        raise InputError(
            f"PyTorch cannot be imported: {error}",
            where="bench/attention.py",
            remedy="Install the extra parity.",
        ) from error
    with Kept(args.out, {"heads": args.heads, "head_size": args.head_size}, gpu=True) as kept:
        for row in sequences(args):
            kept.rows.append(row)
            print(speed(row), flush=True)
        for row in one_token(args):
            kept.rows.append(row)
            print(share(row), flush=True)


if __name__ == "__main__":
    main(run)
