"""Decode speed of the NumPy engine beside others on the CPU: 124M shape, fp32.

    python bench/cpu.py [--rounds 7] [--tokens 48] [--threads 2] [--llama-build TEXT] [--out FILE]

Every engine is a process of its own with the same random weights, prompt and
thread count; they run in turn, one at a time, again and again, so that a busy
machine slows all of them alike. Hugging Face runs eager and sdpa attention,
each through generate() and through a bare loop over its cache; its best counts.
llama.cpp is timed where its llama-bench is on PATH; --llama-build says for the record how it was
built. Ours also continues 8 texts at once.
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
TEXTS = 8
OURS, SEVERAL, LLAMA = "gpt2cupy", f"gpt2cupy, {TEXTS} texts", "llama.cpp"
ENGINES = {OURS: Spec("ours", {"decode": "eager"})} | {
    f"transformers {attention} {loop}": Spec(
        "hf_eager", {"attention": attention, "loop": loop}, needs=("torch", "transformers")
    )
    for attention in ("eager", "sdpa")
    for loop in ("loop", "generate")
}
ENGINES[LLAMA] = Spec("llama_bench", needs=("llama-bench", "gguf"))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Medians of every engine, and ours against the others."""
    engines = {
        name: {
            "tokens_per_second": round(
                (TEXTS if name == SEVERAL else 1) * 1e6 / one["step"]["median_us"], 2
            ),
            "prefill_ms": round(one["prefill"]["median_us"] / 1e3, 2),
            "step": one["step"],
            "same_tokens": one["same_tokens"],
        }
        for name, one in found.items()
    }
    speeds = {name: row["tokens_per_second"] for name, row in engines.items()}
    best = max((n for n in speeds if n.startswith("transformers")), key=speeds.__getitem__)
    result = {
        "engines": engines,
        "best_of_transformers": best,
        "ratio_to_best": round(speeds[OURS] / speeds[best], 3),
        "texts": TEXTS,
        "ratio_of_texts": round(speeds[SEVERAL] / speeds[OURS], 3),
    }
    if LLAMA in speeds:
        result["ratio_to_llama"] = round(speeds[OURS] / speeds[LLAMA], 3)
    return result


def run() -> None:
    options = parser(__doc__, "cpu.json")
    options.set_defaults(device="cpu")
    options.add_argument("--model", default="124M", help="a size of GPT-2, or tiny")
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--tokens", type=int, default=48)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--llama-build", help="how llama.cpp was built, for the record")
    args = options.parse_args()
    chosen([args.device], ["cpu"], "device")
    chosen([args.model], [*SIZES, "tiny"], "model")
    checked(args, {"tokens": 2})
    config = config_of(args.model)
    what = f"a prompt of {PROMPT} and --tokens {args.tokens}"
    check_fits(config, args.model, PROMPT + args.tokens, what)
    several = Spec("ours", {"decode": "eager", "prompts": prompts(config, TEXTS, PROMPT)})
    engines = ENGINES | {SEVERAL: several}
    with tempfile.TemporaryDirectory() as folder, Comparison(engines, args.threads) as comparison:
        write_checkpoint(Path(folder), config, "float32")
        job = {"folder": folder, "dtype": "float32", "device": "cpu", "threads": args.threads}
        job |= {"tokens": args.tokens, "prompts": prompts(config, 1, PROMPT)}
        found = comparison.run(job, args.rounds)
    skipped = dict(found["skipped"])
    without = {LLAMA: skipped.pop(LLAMA)} if LLAMA in skipped else {}
    if skipped:
        raise EngineError("; ".join(f"{name}: {why}" for name, why in skipped.items()))
    shape = {"prompt_tokens": PROMPT, "new_tokens": args.tokens, "threads": args.threads}
    results = {"model": f"{args.model} shape, random weights", "dtype": "float32", "batch": 1}
    results |= shape | {"rounds": args.rounds, "skipped": without} | summary(found["engines"])
    if args.llama_build and LLAMA in found["engines"]:
        results["llama_build"] = args.llama_build
    print(f"{'engine':<32}{'tokens/s':>10}{'prefill ms':>12}{'same tokens':>13}")
    for name, row in results["engines"].items():
        print(
            f"{name:<32}{row['tokens_per_second']:>10.2f}{row['prefill_ms']:>12.1f}"
            f"{row['same_tokens'] if row['same_tokens'] is not None else '-':>13}"
        )
    print(f"gpt2cupy / {results['best_of_transformers']}: {results['ratio_to_best']:.3f}")
    print(f"{TEXTS} texts / one: {results['ratio_of_texts']:.3f}")
    if "ratio_to_llama" in results:
        print(f"gpt2cupy / {LLAMA}: {results['ratio_to_llama']:.3f}")
    record.write(args.out, results, gpu=False)


if __name__ == "__main__":
    main(run)
