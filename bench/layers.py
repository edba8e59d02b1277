"""Feed-forward networks and whole layers composed of gpt2cupy.ops, beside PyTorch.

    python bench/layers.py [--layer ffn --size "Llama-2 7B" --tokens 2048 --dtype float16]

Needs PyTorch with CUDA (extra parity). Without --layer it measures what docs/rows.md shows. A
layer is "ffn" (two products and tanh GELU), "plain" (layer norms, causal attention, GELU) or
"llama" (RMS norms, rotary embedding, grouped heads, SwiGLU). PyTorch runs under inference_mode,
eager and compiled, with TF32 off. Errors are against float64; a result outside the error rule
has no speed. Weights of up to 64 tokens are read from memory: a graph takes one set of them
after another.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from arguments import chosen, main, names, numbers, parsed, parser
from layer_models import LAYERS, SHAPES
from shared import DTYPES, Kept

from gpt2cupy.errors import InputError

# What imports PyTorch lies there.
sys.path.insert(0, str(Path(__file__).resolve().parent / "peers"))

TOKENS = (512, 1024, 2048, 4096)
SEVEN = "Llama-2 7B"
FEW = {SEVEN: (1, 4, 8, 16), "GPT-2": (1, 8)}


def shown_in_rows() -> list[tuple[str, str, int, str]]:
    """The cases of docs/rows.md: (layer, size, tokens, dtype)."""
    cases = [("ffn", SEVEN, n, d) for d in ("float32", "float16") for n in TOKENS]
    cases += [("ffn", SEVEN, 2048, "bfloat16")]
    cases += [("ffn", size, n, "float16") for size, few in FEW.items() for n in few]
    cases += [("plain", SEVEN, n, d) for d in ("float32", "float16") for n in TOKENS]
    cases += [("plain", s, 2048, "float16") for s in SHAPES if s != SEVEN]
    return [
        *cases,
        *(("llama", s, 2048, "float16") for s in SHAPES),
        ("llama", SEVEN, 2048, "float32"),
    ]


def line(row: dict[str, Any]) -> str:
    title = f"{row['layer']} {row['size']} {row['tokens']} {row['dtype']}"
    parts = []
    for name in ("ours", "eager", "compiled"):
        if (side := row.get(name)) is None:
            continue
        if side["gpu_warm"] is None:
            parts.append(f"{name} OUTSIDE THE RULE {side['max_error']:.1e}")
            continue
        ways = [side[w]["p50_us"] for w in ("python", "graph", "gpu_warm", "gpu_cold") if side[w]]
        error = f"{side['max_error']:.1e}/{side['mean_error']:.1e}"
        parts.append(f"{name} {'/'.join(f'{us:.1f}' for us in ways)} err {error}")
    if "read" in row:
        parts.append(f"read {row['read']['p50_us']:.1f}")
    if row["ours"]["gpu_warm"]:
        parts.append(f"{row['flops'] / row['ours']['gpu_warm']['p50_us'] / 1e6:.0f} TFLOP/s")
    return f"{title}: {'; '.join(parts)}; {', '.join(row['kernels'])}"


def run() -> None:
    options = parser(__doc__, "layers.json", devices=("cuda",))
    options.add_argument("--layer", type=names, default=None)
    options.add_argument("--size", type=names, default=[SEVEN])
    options.add_argument("--tokens", type=numbers, default=list(TOKENS))
    options.add_argument("--dtype", type=names, default=["float16"])
    options.add_argument("--runs", type=int, default=10)
    args = parsed(options)
    chosen(args.layer or [], LAYERS, "layer")
    chosen(args.size, SHAPES, "size")
    chosen(args.dtype, DTYPES, "dtype")
    cases = shown_in_rows()
    if args.layer is not None:
        given = ((la, s, t, d) for la in args.layer for s in args.size for d in args.dtype
                 for t in args.tokens)  # fmt: skip
        cases = list(given)
    try:
        from layer_timing import all_layers
    except ImportError as error:
        raise InputError(
            f"PyTorch cannot be imported: {error}",
            where="bench/layers.py",
            remedy="Install the extra parity.",
        ) from error
    with Kept(args.out, {}, gpu=True) as kept:
        for row in all_layers(cases, args.runs):
            kept.rows.append(row)
            print(line(row), flush=True)
            kept.save()


if __name__ == "__main__":
    main(run)
