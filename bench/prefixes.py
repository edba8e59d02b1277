"""Prompts that begin alike: time to all first tokens, against prompts that do not.

    python bench/prefixes.py [--model 124M] [--dtype float16] [--texts 64] [--shared 512]
                             [--own 16] [--runs 20] [--out FILE]

An engine with a slot for each prompt runs --texts prompts at once, the first --shared tokens of
which are the same, each followed by --own others; beside it as many prompts of the same length that
share nothing. Wall-clock time runs from handing them over until each has its first token;
texts that have it go on meanwhile. "kept" is the same with prefix_cache=True and the beginning
left by an earlier run.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, parsed, parser
from shared import DTYPES, Kept, config_of, random_model

from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.timing import Timing


def requests(model: GPT2, args: Any, *, alike: bool, salt: int = 0) -> list[Request]:
    rng = np.random.default_rng(salt)
    size, vocabulary = args.shared + args.own, model.config.vocab_size
    ids = rng.integers(0, vocabulary, (args.texts, size)).astype(np.int32)
    if alike:
        ids[:, : args.shared] = np.random.default_rng(99).integers(0, vocabulary, args.shared)
    params = SamplingParams(max_new_tokens=16, temperature=0.8, seed=1, eos_token_id=-1)
    return [Request(number, row, params) for number, row in enumerate(ids)]


def first_tokens(engine: Engine, wanted: list[Request]) -> float:
    """Seconds until each request has its first token."""
    seen: set[Any] = set()
    start = time.perf_counter()
    with contextlib.closing(engine.blocks(wanted)) as blocks:
        for block in blocks:
            seen.update(block.keys)
            if len(seen) == len(wanted):
                seconds = time.perf_counter() - start
                break
    if engine.model.xp is not np:
        engine.stream.synchronize()  # what was queued ahead
    return seconds


def measure(model: GPT2, args: Any) -> dict[str, Any]:
    plain = Engine(model, args.texts)
    keeping = Engine(model, args.texts, prefix_cache=True)
    cases = {
        "apart": lambda turn: (plain, requests(model, args, alike=False, salt=turn)),
        "shared": lambda turn: (plain, requests(model, args, alike=True, salt=turn)),
        "kept": lambda turn: (keeping, requests(model, args, alike=True, salt=turn)),
    }
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(-2, args.runs):  # the first make graphs
        for name, case in cases.items():
            seconds = first_tokens(*case(turn + 2))
            if turn >= 0:
                times[name].append(seconds)
    row: dict[str, Any] = {name: Timing.of(found).as_dict() for name, found in times.items()}
    for name in ("shared", "kept"):
        row[f"{name}_over_apart"] = row[name]["median_us"] / row["apart"]["median_us"]
    row["reused"] = plain.prefixes.hits / max(plain.prefixes.queries, 1)
    return row


def run() -> None:
    options = parser(__doc__, "prefixes.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--texts", type=int, default=64)
    options.add_argument("--shared", type=int, default=512)
    options.add_argument("--own", type=int, default=16)
    options.add_argument("--runs", type=int, default=20)
    args = parsed(options, {"texts": 2})
    chosen([args.dtype], DTYPES, "dtype")
    config = config_of(args.model)
    check_fits(config, args.model, args.shared + args.own + 16, "--shared and --own")
    names = "model", "dtype", "texts", "shared", "own"
    settings = {name: getattr(args, name) for name in names} | {"weights": "random"}
    with Kept(args.out, settings, gpu=args.device != "cpu") as kept:
        row = measure(random_model(config, args.dtype, args.device), args)
        kept.rows.append(row)
        for name in ("shared", "kept"):
            print(
                f"{name}: {row[name]['median_us'] / 1e3:.2f} ms, "
                f"apart {row['apart']['median_us'] / 1e3:.2f} ms, "
                f"ratio {row[f'{name}_over_apart']:.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main(run)
