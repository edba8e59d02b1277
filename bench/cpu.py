"""Decode speed of the NumPy engine beside Hugging Face's on the CPU: 124M shape, fp32, batch 1.

    python bench/cpu.py [--rounds 7] [--tokens 48] [--threads 2] [--out FILE]

Every engine is a process of its own with the same random weights, prompt and
thread count; they run in turn, one at a time, again and again, so that a busy
machine slows all of them alike. Hugging Face runs eager and sdpa attention,
each through generate() and through a bare loop over its cache; its best counts.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from arguments import check_fits, checked, chosen, main, parser
from shared import SIZES, config_of, prompts, write_checkpoint
from workers import Comparison, EngineError, Spec

from gpt2cupy import record

PROMPT = 32
OURS = "gpt2cupy"
ENGINES = {OURS: Spec("ours", {"decode": "eager"})} | {
    f"transformers {attention} {loop}": Spec(
        "hf_eager", {"attention": attention, "loop": loop}, needs=("torch", "transformers")
    )
    for attention in ("eager", "sdpa")
    for loop in ("loop", "generate")
}


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians of every engine, and ours against Hugging Face's best."""
    engines = {
        name: {
            "tokens_per_second": round(1e6 / one["step"]["median_us"], 2),
            "prefill_ms": round(one["prefill"]["median_us"] / 1e3, 2),
            "step": one["step"],
            "same_tokens": one["same_tokens"],
        }
        for name, one in found.items()
    }
    theirs = {name: row["tokens_per_second"] for name, row in engines.items() if name != OURS}
    best = max(theirs, key=theirs.__getitem__)
    return {
        "engines": engines,
        "best_of_transformers": best,
        "ratio_to_best": round(engines[OURS]["tokens_per_second"] / theirs[best], 3),
    }


def run() -> None:
    options = parser(__doc__, "cpu.json")
    options.set_defaults(device="cpu")
    options.add_argument("--model", default="124M", help="a size of GPT-2, or tiny")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--tokens", type=int, default=48)
    options.add_argument("--threads", type=int, default=2)
    args = options.parse_args()
    chosen([args.device], ["cpu"], "device")
    chosen([args.model], [*SIZES, "tiny"], "model")
    checked(args, {"tokens": 2})
    config = config_of(args.model)
    what = f"a prompt of {PROMPT} and --tokens {args.tokens}"
    check_fits(config, args.model, PROMPT + args.tokens, what)
    with tempfile.TemporaryDirectory() as folder, Comparison(ENGINES, args.threads) as comparison:
        write_checkpoint(Path(folder), config, "float32")
        job = {"folder": folder, "dtype": "float32", "device": "cpu", "threads": args.threads}
        job |= {"tokens": args.tokens, "prompts": prompts(config, 1, PROMPT)}
        found = comparison.run(job, args.rounds)
    if found["skipped"]:
        raise EngineError("; ".join(f"{name}: {why}" for name, why in found["skipped"].items()))
    shape = {"prompt_tokens": PROMPT, "new_tokens": args.tokens, "threads": args.threads}
    results = {"model": f"{args.model} shape, random weights", "dtype": "float32", "batch": 1}
    results |= shape | {"rounds": args.rounds} | summary(found["engines"])
    print(f"{'engine':<32}{'tokens/s':>10}{'prefill ms':>12}{'same tokens':>13}")
    for name, row in results["engines"].items():
        print(
            f"{name:<32}{row['tokens_per_second']:>10.2f}{row['prefill_ms']:>12.1f}"
            f"{row['same_tokens']:>13}"
        )
    print(f"gpt2cupy / {results['best_of_transformers']}: {results['ratio_to_best']:.3f}")
    record.write(args.out, results, gpu=False)


if __name__ == "__main__":
    main(run)
