"""What batch_invariant=True costs: steps and prompts with it and without, on the same weights.

    python bench/invariance.py [--model 124M] [--dtype float16] [--batch 1,4,16,64]
                               [--context 256] [--tokens 128,512] [--out FILE]

A step and a prompt are those of bench/decode.py and bench/prefill.py, by the fastest decode path.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import prefill
from arguments import check_fits, chosen, main, names, numbers, parsed, parser
from decode import measure_step, reach
from shared import DTYPES, Kept, config_of, default_path, random_model, too_large

from gpt2cupy import GPT2


def measured(models: dict[str, GPT2], args: Any) -> Iterator[dict[str, Any]]:
    """A row for every batch, then one for every length of a prompt."""
    path = default_path(args.device)
    for batch in args.batch:
        row: dict[str, Any] = {"batch": batch, "context": args.context}
        for name, model in models.items():
            found = measure_step(model, path, batch, args.context, args.runs)
            row[name] = found["step"]
            row.setdefault("decode", found["decode"])  # of the default; the other takes a graph
        yield row
    for tokens in args.tokens:
        row = {"tokens": tokens}
        for name, model in models.items():
            row[name] = prefill.measure(model, tokens, args.runs)["device"]
        yield row


def run() -> None:
    options = parser(__doc__, "invariance.json")
    options.add_argument("--model", type=names, default=["124M"])
    options.add_argument("--dtype", type=names, default=["float16"])
    options.add_argument("--batch", type=numbers, default=[1, 4, 16, 64])
    options.add_argument("--context", type=int, default=256)
    options.add_argument("--tokens", type=numbers, default=[128, 512])
    options.add_argument("--runs", type=int, default=30)
    args = parsed(options)
    chosen(args.dtype, DTYPES, "dtype")
    configs = {size: config_of(size) for size in args.model}
    for size, config in configs.items():
        check_fits(config, size, reach(args.context), f"steps at context {args.context}")
        check_fits(config, size, max(args.tokens), "--tokens")
    with Kept(args.out, {"weights": "random"}, gpu=args.device != "cpu") as kept:
        for size, config in configs.items():
            for dtype in args.dtype:
                if reason := too_large(config, dtype, max(args.batch), args.device):
                    kept.skip(f"{size} {dtype}", reason)
                    continue
                model = random_model(config, dtype, args.device)
                invariant = GPT2(config, model.weights, batch_invariant=True)
                for row in measured({"default": model, "invariant": invariant}, args):
                    kept.rows.append({"model": size, "dtype": dtype} | row)
                    what = "tokens" if "tokens" in row else "batch"
                    print(
                        f"{size} {dtype} {what} {row[what]}: {row['default']['median_us']:.0f} us, "
                        f"batch-invariant {row['invariant']['median_us']:.0f} us",
                        flush=True,
                    )
                del model, invariant


if __name__ == "__main__":
    main(run)
