"""The whole forward pass for each token, against a KV cache: what the cache is worth.

    python bench/naive.py [--model 124M] [--dtype bfloat16,float16] [--batch 1,4,16]
                          [--prompt 32] [--tokens 512] [--rounds 3] [--out FILE]

Ours both ways, and Hugging Face transformers both ways (use_cache=False and True); each
engine is a process of its own over the same random weights, and they run in turn.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from shared import (
    DTYPES,
    chosen,
    config_of,
    main,
    names,
    numbers,
    parsed,
    parser,
    paths,
    prompts,
    too_large,
    write_checkpoint,
)
from workers import Comparison, Spec

from gpt2cupy import record


def specs(path: str) -> dict[str, Spec]:
    """Both ways of both engines; ours with the cache takes decode path ``path``."""
    return {
        "gpt2cupy cached": Spec("ours", {"decode": path}),
        "gpt2cupy naive": Spec("ours", {"naive": True}, warmup=1),
        "transformers cached": Spec("hf_eager", {"use_cache": True}, warmup=0),
        "transformers naive": Spec("hf_eager", {"use_cache": False}, warmup=0),
    }


def run() -> None:
    options = parser(__doc__, "naive.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", type=names, default=["bfloat16", "float16"])
    options.add_argument("--batch", type=numbers, default=[1, 4, 16])
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--engines", type=names, help="all by default")
    options.add_argument("--decode", help="decode path with the cache; the fastest by default")
    args = parsed(options)
    chosen(args.dtype, DTYPES, "dtype")
    path = args.decode or paths(args.device)[-1]
    chosen([path], paths(args.device), "decode path")
    engines = specs(path)
    wanted = chosen(args.engines or list(engines), engines, "engine")

    config = config_of(args.model)
    rows: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    try:
        with (
            Comparison({name: engines[name] for name in wanted}) as comparison,
            tempfile.TemporaryDirectory() as name,
        ):
            for dtype in args.dtype:
                largest = max(args.batch)
                if reason := too_large(config, dtype, largest, args.device, len(wanted)):
                    skipped[f"{args.model} {dtype}"] = reason
                    print(f"{args.model} {dtype}: skipped, {reason}", flush=True)
                    continue
                folder = Path(name) / dtype
                write_checkpoint(folder, config, dtype)
                for batch in args.batch:
                    job = {"folder": str(folder), "dtype": dtype, "device": args.device}
                    job |= {"tokens": args.tokens, "prompts": prompts(config, batch, args.prompt)}
                    rows.append({"dtype": dtype, "batch": batch})
                    rows[-1] |= comparison.run(job, args.rounds)
                    show(rows[-1])
    finally:
        if rows:
            results = {"model": args.model, "prompt": args.prompt, "tokens": args.tokens}
            results |= {"rounds": args.rounds, "decode": path, "rows": rows, "skipped": skipped}
            record.write(args.out, results, gpu=args.device != "cpu")


def show(row: dict[str, Any]) -> None:
    """Print one row: tokens/s of each engine."""
    rates = [
        f"{name} {1e6 * row['batch'] / found['step']['median_us']:.0f}"
        for name, found in row["engines"].items()
    ]
    skipped = [f"{name} skipped, {reason}" for name, reason in row["skipped"].items()]
    line = ", ".join([*rates, *skipped])
    print(f"{row['dtype']} batch {row['batch']}, tokens/s: {line}", flush=True)


if __name__ == "__main__":
    main(run)
