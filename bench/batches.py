"""Time of a decode step against batch and against context, beside the memory roofline.

    python bench/batches.py [--model 124M] [--batch 1,2,4,8,16,32,64] [--large 256x512]
                            [--context 1,32,128,256,512,768,1000] [--decode graph] [--out FILE]

The batches are measured at one context (--at, 256) in the first dtype; --large is one more batch
with its context, and the contexts are measured at batch 1 in every dtype. What a step is and how
it is timed stands in decode.py. "read" is the memory roofline: a
kernel that only reads the weights and the cache so far, in the same run.
"""

from __future__ import annotations

import argparse

from arguments import check_fits, chosen, main, names, numbers, parsed, parser
from decode import measure_step, reach
from shared import (
    DTYPES,
    Kept,
    Reader,
    config_of,
    default_path,
    paths,
    random_model,
    step_bytes,
    too_large,
)


def point(text: str) -> tuple[int, int]:
    """BATCHxCONTEXT."""
    batch, context = text.split("x")
    return int(batch), int(context)


def points(args: argparse.Namespace, *, first: bool) -> list[tuple[int, int]]:
    """(batch, context) of every step measured in the first dtype, or in another."""
    found = [(1, context) for context in args.context]
    if first:
        found += [*((batch, args.at) for batch in args.batch), args.large]
    return list(dict.fromkeys(found))


def run() -> None:
    options = parser(__doc__, "batches.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", type=names, default=list(DTYPES))
    options.add_argument("--batch", type=numbers, default=[1, 2, 4, 8, 16, 32, 64])
    options.add_argument("--at", type=int, default=256, help="context of the batches")
    options.add_argument("--large", type=point, default=(256, 512), metavar="BATCHxCONTEXT")
    options.add_argument("--context", type=numbers, default=[1, 32, 128, 256, 512, 768, 1000])
    options.add_argument("--decode", help="decode path; the fastest by default")
    options.add_argument("--runs", type=int, default=30)
    args = parsed(options)
    known = paths(args.device)
    path = args.decode or default_path(args.device)
    chosen([path], [*known, "auto"], "decode path")
    chosen(args.dtype, DTYPES, "dtype")
    config = config_of(args.model)
    for _, context in points(args, first=True):
        check_fits(config, args.model, reach(context), f"steps at context {context}")

    on_gpu = args.device != "cpu"
    reader = Reader() if on_gpu else None
    settings = {"weights": "random", "decode": path, "at": args.at}
    with Kept(args.out, settings, gpu=on_gpu) as kept:
        for number, dtype in enumerate(args.dtype):
            model = None  # the one before is freed
            for batch, context in points(args, first=not number):
                if reason := too_large(config, dtype, batch, args.device):
                    kept.skip(f"{args.model} {dtype}, batch {batch}", reason)
                    continue
                model = model or random_model(config, dtype, args.device)
                row = {"model": args.model, "dtype": dtype, "batch": batch}
                row |= measure_step(model, path, batch, context, args.runs)
                us = row["step"]["median_us"]
                row["tokens_per_second"] = 1e6 * batch / us
                row["bytes"] = step_bytes(config, dtype, batch, context)
                title = f"{args.model} {dtype} batch {batch} context {context}: {us:.0f} us"
                if reader:
                    read = reader.time(row["bytes"])
                    row["read"] = read.as_dict()
                    title += f" (read {read.median_us:.0f})"
                kept.rows.append(row)
                print(f"{title}, {row['tokens_per_second']:.0f} tokens/s", flush=True)


if __name__ == "__main__":
    main(run)
