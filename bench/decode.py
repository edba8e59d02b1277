"""Time of a decode step: random weights of a GPT-2's shape, one token per row and step.

    python bench/decode.py [--model gpt2] [--dtype float16] [--batch 1] [--out FILE]

A step is everything from feeding a token to the next one chosen: embedding, all
layers, logits, sampling. "step" is the time between events around it; "host" is
what Python takes to queue it; "end_to_end" is a token's time in a whole
generation, read by the host as it would be shown.
"""

from __future__ import annotations

import argparse
import time

import cupy
import numpy as np

from gpt2cupy import GPT2, GPT2Config, SamplingParams, record
from gpt2cupy.engine import Engine, Request
from gpt2cupy.timing import Timing, device_times


def filled_engine(model: GPT2, batch: int, context: int) -> Engine:
    """An engine whose rows all stand at ``context`` tokens."""
    engine = Engine(model, batch)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.8, seed=1).row(0, 0, -1)
    with engine.stream:
        for row in range(batch):
            prompt = rng.integers(0, model.config.vocab_size, context)
            for start in range(0, context, engine.prefill_work.rows):
                part = prompt[start : start + engine.prefill_work.rows]
                model.prefill([part], [row], engine.cache, engine.prefill_work)
            engine.state.assign(row, row, params)
            engine.state.seek(row, context - 1)
    return engine


def measure_step(model: GPT2, batch: int, context: int, runs: int) -> dict[str, object]:
    engine = filled_engine(model, batch, context)
    seconds = []
    with engine.stream:

        def step() -> None:
            # The positions advance with each step; go back so that the context stays.
            engine.state.positions.fill(context - 1)
            start = time.perf_counter()
            engine.decoder.step(engine.state)
            seconds.append(time.perf_counter() - start)

        timing = device_times(step, runs=runs)
    host = Timing.of(seconds[5:])
    return {"context": context, "step": timing.as_dict(), "host": host.as_dict()}


def measure_text(model: GPT2, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    engine = Engine(model, batch)
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0.8, seed=1, max_new_tokens=tokens)

    def generate() -> float:
        requests = [
            Request(i, rng.integers(0, model.config.vocab_size, prompt).astype(np.int32), params)
            for i in range(batch)
        ]
        first, count = 0.0, 0
        for _ in engine.run(requests):
            first = first or time.perf_counter()
            count += 1
        return (time.perf_counter() - first) / (count - batch) * batch

    generate()
    timing = Timing.of([generate() for _ in range(5)])
    return {"prompt": prompt, "tokens": tokens, "us_per_step": timing.median_us}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="gpt2")
    parser.add_argument("--dtype", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--context", type=int, nargs="+", default=[128, 1000])
    parser.add_argument("--gemv", nargs="+", default=["ours", "cublas"])
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--out", default=str(record.RESULTS / "decode.json"))
    args = parser.parse_args()

    rows = []
    for dtype in args.dtype:
        model = GPT2.random(GPT2Config.from_name(args.model), 0, dtype=dtype, device="cuda")
        for batch in args.batch:
            for gemv in args.gemv if batch == 1 else args.gemv[:1]:
                model.gemv = gemv
                row: dict[str, object] = {"dtype": dtype, "batch": batch, "gemv": gemv}
                steps = [measure_step(model, batch, c, args.runs) for c in args.context]
                row |= {"steps": steps, "end_to_end": measure_text(model, batch, 32, 200)}
                rows.append(row)
                line = ", ".join(
                    f"context {s['context']}: {s['step']['median_us']:.0f} us" for s in steps
                )
                per_step = row["end_to_end"]["us_per_step"]
                print(
                    f"{dtype} batch {batch} {gemv}: {line}; in a text {per_step:.0f} us", flush=True
                )
        del model
        cupy.get_default_memory_pool().free_all_blocks()
    results = {"model": args.model, "decoder": "eager", "weights": "random", "rows": rows}
    record.write(args.out, results, gpu=True)


if __name__ == "__main__":
    main()
