"""Time of a prompt: one sequence of random tokens, random weights of a GPT-2's size.

    python bench/prefill.py [--model 124M] [--dtype float16] [--tokens 128,512,1024] [--out FILE]

"device" is the time between events around some prompts in a row, per prompt: the
forward pass and the sampling of the first token, without the GPU's wait for Python
(25 to 30 us before a prompt that comes alone). "first token" is what a caller of
Python waits, from the call to the token's id.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, names, numbers, parsed, parser
from shared import DTYPES, Kept, config_of, random_model, too_large

from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.timing import Timing, times

IN_A_ROW = 4  # prompts between two events


def measure(model: GPT2, tokens: int, runs: int) -> dict[str, Any]:
    engine = Engine(model, 1)
    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, tokens)
    prompt = prompt.astype(np.int32)
    state = engine.state

    def prefill() -> None:
        engine.cache.reset()
        engine.prompts.run([prompt], [0], state)

    with engine.stream:
        state.assign(0, 0, SamplingParams(temperature=0).row(0, tokens, -1))
        device = times(
            prefill,
            model.xp,
            runs=runs,
            inner=IN_A_ROW,
            before=lambda: state.seek(0, tokens - 1),
        )

    engine = Engine(model, 1)  # the other's count of steps is behind its device's by now

    def first_token() -> float:
        request = Request(0, prompt, SamplingParams(temperature=0, max_new_tokens=1))
        start = time.perf_counter()
        next(iter(engine.run([request])))
        return time.perf_counter() - start

    waited = Timing.of([first_token() for _ in range(runs + 5)][5:])
    return {"tokens": tokens, "device": device.as_dict(), "first_token": waited.as_dict()}


def run() -> None:
    options = parser(__doc__, "prefill.json")
    options.add_argument("--model", type=names, default=["124M"])
    options.add_argument("--dtype", type=names, default=["float16"])
    options.add_argument("--tokens", type=numbers, default=[128, 512, 1024])
    options.add_argument("--runs", type=int, default=30)
    args = parsed(options)
    chosen(args.dtype, DTYPES, "dtype")
    configs = {size: config_of(size) for size in args.model}
    for size, config in configs.items():
        check_fits(config, size, max(args.tokens), "--tokens")
    with Kept(args.out, {"weights": "random"}, gpu=args.device != "cpu") as kept:
        for size, config in configs.items():
            for dtype in args.dtype:
                if reason := too_large(config, dtype, 1, args.device):
                    kept.skip(f"{size} {dtype}", reason)
                    continue
                model = random_model(config, dtype, args.device)
                for tokens in args.tokens:
                    row = {"model": size, "dtype": dtype} | measure(model, tokens, args.runs)
                    kept.rows.append(row)
                    print(
                        f"{size} {dtype} 1 x {tokens}: {row['device']['median_us'] / 1e3:.3f} ms, "
                        f"first token {row['first_token']['median_us'] / 1e3:.3f} ms",
                        flush=True,
                    )
                del model


if __name__ == "__main__":
    main(run)
