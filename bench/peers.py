"""Ours beside what a user would pick instead, in one invocation on one device.

    python bench/peers.py [--model 124M,1558M] [--dtype float16] [--batch 1] [--prompt 32]
                          [--tokens 200] [--rounds 5] [--engines NAME,...] [--out FILE]

Every engine is a process of its own (bench/peers/) that loads the same checkpoint of
random weights; they run in turn, there and back again. A run is greedy: the prompt,
then the tokens; "step" is the time a step takes over the run. Loading and compiling
are timed apart. Peers are timed once per version, not at every change of ours. One that is
not installed is skipped, and the record says so: PyTorch with transformers, llama.cpp
(llama-bench on PATH, the extra bench for the package gguf), tinygrad, vLLM.
Ours is timed through `LanguageModel.generate`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from arguments import check_fits, chosen, main, names, numbers, parsed, parser
from shared import DTYPES, Kept, config_of, default_path, prompts, too_large, write_checkpoint
from workers import Comparison, Spec

_HF = ("torch", "transformers")
# Engines that are known and not timed.
NOT_TIMED = {"ONNX Runtime": "GPT-2 with its cache would have to be exported first"}


def specs(device: str) -> dict[str, Spec]:
    """Every engine by name; one that is not installed is skipped and says so."""
    eager = {"attention": "sdpa", "loop": "generate"}
    return {
        "gpt2cupy": Spec("ours", {"decode": default_path(device)}),
        "transformers eager": Spec("hf_eager", eager, needs=_HF),
        "transformers compiled": Spec("hf_compiled", needs=_HF),
        "PyTorch step": Spec("torch_step", needs=("torch",)),
        "llama.cpp": Spec("llama_bench", needs=("llama-bench", "gguf")),
        "tinygrad": Spec("tinygrad_step", needs=("tinygrad",)),
        "vLLM": Spec("vllm_engine", needs=("vllm",)),
    }


def run() -> None:
    options = parser(__doc__, "peers.json")
    options.add_argument("--model", type=names, default=["124M", "1558M"])
    options.add_argument("--dtype", type=names, default=["float16"])
    options.add_argument("--batch", type=numbers, default=[1])
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--engines", type=names, help="all by default")
    args = parsed(options, {"tokens": 2})
    chosen(args.dtype, DTYPES, "dtype")
    engines = specs(args.device)
    wanted = chosen(args.engines or list(engines), engines, "engine")

    configs = {size: config_of(size) for size in args.model}
    for size, config in configs.items():
        what = f"--prompt {args.prompt} and --tokens {args.tokens}"
        check_fits(config, size, args.prompt + args.tokens, what)
    settings = {"weights": "random", "prompt": args.prompt, "tokens": args.tokens}
    settings["rounds"] = args.rounds
    with (
        Kept(args.out, settings, gpu=args.device != "cpu") as kept,
        Comparison({name: engines[name] for name in wanted}) as comparison,
    ):
        for name, reason in NOT_TIMED.items():
            kept.skip(name, reason)
        for size, config in configs.items():
            with tempfile.TemporaryDirectory() as name:
                for dtype in args.dtype:
                    count = len(comparison.workers)
                    if reason := too_large(config, dtype, max(args.batch), args.device, count):
                        kept.skip(f"{size} {dtype}", reason)
                        continue
                    write_checkpoint(Path(name) / dtype, config, dtype)
                    for batch in args.batch:
                        job = {"folder": str(Path(name) / dtype), "dtype": dtype}
                        job |= {"device": args.device, "tokens": args.tokens}
                        job["prompts"] = prompts(config, batch, args.prompt)
                        row = {"model": size, "dtype": dtype, "batch": batch}
                        kept.rows.append(row | comparison.run(job, args.rounds))
                        show(kept.rows[-1])
                        kept.save()


def show(row: dict[str, Any]) -> None:
    """Print one row."""
    title = " ".join(str(row[key]) for key in ("model", "dtype", "batch"))
    for name, found in row["engines"].items():
        us = found["step"]["median_us"]
        same = found["same_tokens"]
        note = "" if same is None else f", {same} tokens as the first engine"
        rate = 1e6 * row["batch"] / us
        print(f"{title} {name}: {us:.0f} us a step, {rate:.0f} tokens/s{note}", flush=True)
    for name, reason in row["skipped"].items():
        print(f"{title} {name}: skipped, {reason}", flush=True)


if __name__ == "__main__":
    main(run)
