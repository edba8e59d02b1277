"""The whole forward pass for each token, against a KV cache: what the cache is worth.

    python bench/naive.py [--model 124M] [--dtype bfloat16,float16] [--batch 1,4,16]
                          [--prompt 32] [--tokens 512] [--rounds 1] [--out FILE]

Ours both ways, and Hugging Face transformers both ways (use_cache=False and True); each
engine is a process of its own over the same random weights, and they run in turn. Before it
is timed an engine runs once at a length of each bucket of our graphs, and at the longest.
PyTorch's attention leaves cuDNN out: recent PyTorch prefers it on sm_90, and it builds a plan
for every new length, so each step would pay for one. A record says that it is complete only
when the last batch is done.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, names, numbers, parsed, parser
from shared import (
    DTYPES,
    Kept,
    config_of,
    default_path,
    paths,
    prompts,
    too_large,
    write_checkpoint,
)
from workers import Comparison, Spec

from gpt2cupy import record
from gpt2cupy.decode.prompt import BUCKETS

_HF = ("torch", "transformers")
START_S = 25  # importing PyTorch, making a GPU ready, compiling: all processes at once


def specs(path: str) -> dict[str, Spec]:
    """Both ways of both engines; ours with the cache takes decode path ``path``."""
    # Every step has a length that none had before: cuDNN's attention would be prepared in each.
    theirs = {"keep": True, "cudnn": False}
    return {
        "gpt2cupy cached": Spec("ours", {"decode": path}, warmup=1),
        "gpt2cupy naive": Spec("ours", {"naive": True}, warmup=0),
        "transformers cached": Spec("hf_eager", theirs | {"use_cache": True}, 0, _HF),
        "transformers naive": Spec("hf_eager", theirs | {"use_cache": False}, 0, _HF),
    }


def lengths(batch: int, prompt: int, tokens: int) -> list[int]:
    """Lengths of text that meet every bucket of ours, and the longest."""
    each = {min(max(rows // batch, prompt), prompt + tokens - 1) for rows in BUCKETS}
    return sorted(each | {prompt + tokens - 1})


def estimate(batches: list[int], dtypes: int, prompt: int, tokens: int) -> float:
    """Seconds that this takes with the 124M, from the records of its parts.

    Raises
    ------
    OSError, LookupError, ValueError
        If a record or a row of it is missing, or it is damaged.
    """

    def rows(name: str) -> list[dict[str, Any]]:
        return json.loads((record.RESULTS / f"{name}.json").read_text())["results"]["rows"]

    eager_us = rows("peers")[0]["engines"]["transformers eager"]["step"]["median_us"]
    forward = [(row["tokens"], row["device"]["median_us"]) for row in rows("prefill")]
    steps = {row["batch"]: row["end_to_end"]["us_per_step"] for row in rows("decode")}
    (few, few_us), (most, most_us) = forward[0], forward[-1]
    total = 0.0
    for batch in batches:
        texts = batch * np.arange(prompt, prompt + tokens)
        device = few_us + np.maximum(texts - few, 0) * (most_us - few_us) / (most - few)
        ours = np.sum(device + 1500)  # where no graph has its length Python launches every kernel
        # PyTorch's launches, or its unfused kernels at some three times our time.
        theirs = np.sum(np.maximum(eager_us, 3 * device))
        cached = tokens * (2 * steps[batch] + eager_us)
        total += ours + theirs + cached
    return START_S + dtypes * total / 1e6


def run() -> None:
    options = parser(__doc__, "naive.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", type=names, default=["bfloat16", "float16"])
    options.add_argument("--batch", type=numbers, default=[1, 4, 16])
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--engines", type=names, help="all by default")
    options.add_argument("--decode", help="decode path with the cache; the fastest by default")
    args = parsed(options, {"tokens": 2})
    chosen(args.dtype, DTYPES, "dtype")
    path = args.decode or default_path(args.device)
    chosen([path], [*paths(args.device), "auto"], "decode path")
    engines = specs(path)
    wanted = chosen(args.engines or list(engines), engines, "engine")

    config = config_of(args.model)
    what = f"--prompt {args.prompt} and --tokens {args.tokens}"
    check_fits(config, args.model, args.prompt + args.tokens, what)
    settings = {"model": args.model, "prompt": args.prompt, "tokens": args.tokens}
    settings |= {"rounds": args.rounds, "decode": path}
    with (
        Kept(args.out, settings, gpu=args.device != "cpu") as kept,
        Comparison({name: engines[name] for name in wanted}, together=True) as comparison,
        tempfile.TemporaryDirectory() as name,
    ):
        try:
            shape = args.batch, len(args.dtype), args.prompt, args.tokens
            comparison.say(f"about {estimate(*shape):.0f} s for the 124M on the records' GPU")
        except (OSError, LookupError, ValueError) as error:
            comparison.say(f"no estimate: a record or a row of it is missing or damaged ({error})")
        for dtype in args.dtype:
            largest = max(args.batch)
            if reason := too_large(config, dtype, largest, args.device, len(wanted)):
                kept.skip(f"{args.model} {dtype}", reason)
                continue
            folder = Path(name) / dtype
            write_checkpoint(folder, config, dtype)
            for batch in args.batch:
                comparison.say(f"{dtype} batch {batch}")
                job = {"folder": str(folder), "dtype": dtype, "device": args.device}
                job |= {"tokens": args.tokens, "prompts": prompts(config, batch, args.prompt)}
                job["lengths"] = lengths(batch, args.prompt, args.tokens)
                found = comparison.run(job, args.rounds)
                kept.rows.append({"dtype": dtype, "batch": batch} | found)
                show(kept.rows[-1])
                kept.save()
        comparison.say("done")


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
