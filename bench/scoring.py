"""Scoring of pairs (context, continuation) through `LanguageModel.score`: pairs per second.

    python bench/scoring.py [--model 124M] [--dtype float16] [--pairs 12000] [--context 100]
                            [--continuation 10] [--out FILE]

The clock runs from the call with a list of pairs of texts to the list of scores: encoding, packed
passes without padding, and the log-probabilities of the continuations' tokens. Beside it stand the
same pairs one call at a time, some of them, and what encoding alone takes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, parsed, parser
from shared import DTYPES, Kept, config_of, write_checkpoint
from words import texts, write_words

import gpt2cupy
from gpt2cupy import LanguageModel
from gpt2cupy.generation.scored_texts import ScoredEncoder
from gpt2cupy.timing import Timing

ALONE = 200  # pairs of the calls for one


def seconds(call: Callable[[], Any], runs: int) -> Timing:
    def once() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    once()
    return Timing.of([once() for _ in range(runs)])


def measure(lm: LanguageModel, args: Any) -> dict[str, Any]:
    whole = texts(lm.tokenizer, args.pairs, args.context + args.continuation)
    pairs = []
    for text in whole:
        ids = lm.tokenizer.encode(text)
        context = lm.tokenizer.decode(ids[: args.context])
        pairs.append((context, text[len(context) :]))
    encode = ScoredEncoder(lm.tokenizer, lm.config, [])
    found = lm.score(pairs, bos=False)
    alone = [lm.score([pair], bos=False)[0] for pair in pairs[:ALONE]]
    apart = max(
        float(np.abs(one.logprobs - many.logprobs).max())
        for one, many in zip(alone, found, strict=False)
    )
    wall = seconds(lambda: lm.score(pairs, bos=False), args.runs)
    each = seconds(lambda: [lm.score([p], bos=False) for p in pairs[:ALONE]], args.runs)
    host = seconds(lambda: [encode(pair) for pair in pairs], args.runs)
    scored = sum(len(score.tokens) for score in found)
    tokens = sum(len(encode(pair)[0]) for pair in pairs)
    row: dict[str, Any] = {"pairs": len(pairs), "tokens": tokens, "scored": scored}
    row |= {"wall": wall.as_dict(), "alone": each.as_dict(), "encoding": host.as_dict()}
    row |= {"alone_pairs": min(ALONE, len(pairs)), "apart": apart}
    row["pairs_per_second"] = 1e6 * len(pairs) / wall.median_us
    row["tokens_per_second"] = 1e6 * tokens / wall.median_us
    row["alone_per_second"] = 1e6 * row["alone_pairs"] / each.median_us
    return row


def run() -> None:
    options = parser(__doc__, "scoring.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--pairs", type=int, default=12000)
    options.add_argument("--context", type=int, default=100)
    options.add_argument("--continuation", type=int, default=10)
    options.add_argument("--runs", type=int, default=3)
    args = parsed(options)
    chosen([args.dtype], DTYPES, "dtype")
    config = config_of(args.model)
    wanted = args.context + args.continuation
    check_fits(config, args.model, wanted, "--context and --continuation")
    settings = {"model": args.model, "dtype": args.dtype, "weights": "random"}
    settings |= {"context": args.context, "continuation": args.continuation}
    gpu = args.device != "cpu"
    with tempfile.TemporaryDirectory() as name, Kept(args.out, settings, gpu=gpu) as kept:
        write_checkpoint(Path(name), config, args.dtype)
        write_words(Path(name), config.vocab_size)
        with gpt2cupy.load(name, device=args.device) as lm:
            row = measure(lm, args)
            kept.rows.append(row)
            print(
                f"{row['pairs_per_second']:.0f} pairs/s ({row['tokens_per_second']:.0f} tokens/s); "
                f"one call for each {row['alone_per_second']:.0f}; encoding alone "
                f"{row['encoding']['median_us'] / row['pairs']:.1f} us a pair; one and many differ "
                f"by at most {row['apart']:.2g}",
                flush=True,
            )


if __name__ == "__main__":
    main(run)
