"""Time of a decode step: random weights of GPT-2's sizes, one token per row and step.

    python bench/decode.py [--model 124M,355M,774M,1558M] [--dtype float16,bfloat16,float32]
                           [--batch 1,4,16] [--context 128,1000] [--decode eager]
                           [--quantize int8] [--out FILE]

A step is everything from feeding a token to the next one chosen: embedding, all
layers, logits, sampling. "step" is the time between events around some steps in
a row, per step; "host" is what Python takes to queue one; "read" is what a plain
read of the bytes that the step must read takes in the same run; "end_to_end" is a
token's time in a whole generation, read by the host as it would be shown. Sizes
that do not fit the GPU are skipped, saying so.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, names, numbers, parsed, parser
from shared import (
    DTYPES,
    PREFILL_ROWS,
    Kept,
    Reader,
    backends,
    config_of,
    paths,
    random_model,
    step_bytes,
    too_large,
)

from gpt2cupy import GPT2, SamplingParams, decode
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.timing import Timing, times

IN_A_ROW = 8  # steps between two events: the GPU then waits for Python only if it must


def filled_engine(model: GPT2, path: str, batch: int, context: int) -> Engine:
    """An engine whose rows all hold ``context`` tokens."""
    engine = Engine(model, batch, decode=path)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=0.8, seed=1).row(0, 0, -1)
    with engine.stream:
        for row in range(batch):
            prompt = rng.integers(0, model.config.vocab_size, context)
            for start in range(0, context, PREFILL_ROWS):
                part = prompt[start : start + PREFILL_ROWS]
                model.prefill([part], [row], engine.cache, engine.prefill_work)
            engine.state.assign(row, row, params)
    return engine


def first_position(context: int) -> int:
    """Where the steps in a row begin, so that ``context`` is about their middle."""
    return max(context - 1 - IN_A_ROW // 2, 0)


def reach(context: int) -> int:
    """Tokens that a row may hold while its steps at a context are measured."""
    return max(context, first_position(context) + IN_A_ROW)


def measure_step(model: GPT2, path: str, batch: int, context: int, runs: int) -> dict[str, Any]:
    engine = filled_engine(model, path, batch, context)
    queueing: list[float] = []

    def back() -> None:
        # The positions advance with each step; go back so that the context stays what it is.
        engine.state.positions.fill(first_position(context))

    def steps() -> None:
        start = time.perf_counter()
        engine.decoder.step(engine.state, IN_A_ROW)
        queueing.append((time.perf_counter() - start) / IN_A_ROW)

    with engine.stream:
        whole = times(steps, model.xp, runs=runs, before=back)
    step = Timing(*(us / IN_A_ROW for us in (whole.median_us, whole.p10_us, whole.p90_us)), runs)
    return {
        "context": context,
        "decode": engine.decoder.name,
        "step": step.as_dict(),
        "host": Timing.of(queueing[-runs:]).as_dict(),
    }


def measure_text(model: GPT2, path: str, batch: int, prompt: int, tokens: int) -> dict[str, Any]:
    engine = Engine(model, batch, decode=path)
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
    figures = {"us_per_step": timing.median_us, "step": timing.as_dict()}
    return {"prompt": prompt, "tokens": tokens} | figures


def measure_row(model: GPT2, row: dict[str, Any], args: Any, reader: Reader | None) -> None:
    """Fill in one combination's figures and print them."""
    path, batch = row["decode"], row["batch"]
    row["steps"] = []
    for context in args.context:
        step = measure_step(model, path, batch, context, args.runs)
        step["bytes"] = step_bytes(model.config, row["dtype"], batch, context, args.quantize)
        if reader:
            step["read"] = reader.time(step["bytes"]).as_dict()
        row["steps"].append(step)
    row["end_to_end"] = measure_text(model, path, batch, args.prompt, args.tokens)
    line = ", ".join(
        f"context {s['context']}: {s['step']['median_us']:.0f} us"
        + (f" (read {s['read']['median_us']:.0f})" if reader else "")
        for s in row["steps"]
    )
    title = " ".join(str(row[key]) for key in ("model", "dtype", "batch", "decode", "gemv"))
    title += f" {args.quantize}" if args.quantize else ""
    print(f"{title}: {line}; in a text {row['end_to_end']['us_per_step']:.0f} us", flush=True)


def run() -> None:
    options = parser(__doc__, "decode.json")
    options.add_argument("--model", type=names, default=["124M"])
    options.add_argument("--dtype", type=names, default=list(DTYPES))
    options.add_argument("--batch", type=numbers, default=[1, 4, 16])
    options.add_argument("--context", type=numbers, default=[128, 1000])
    options.add_argument("--decode", type=names, help="decode paths; all by default")
    options.add_argument("--gemv", type=names, default=["ours", "cublas"])
    options.add_argument("--quantize", choices=["int8"], help="hold the matrices in int8")
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--runs", type=int, default=30)
    args = parsed(options, {"tokens": 2})
    known = paths(args.device)
    named = args.decode is not None
    args.decode = chosen(args.decode or known, known, "decode path")
    chosen(args.dtype, DTYPES, "dtype")
    chosen(args.gemv, ("ours", "cublas"), "backend")
    configs = {size: config_of(size) for size in args.model}
    for size, config in configs.items():
        for context in args.context:
            check_fits(config, size, reach(context), f"steps at context {context}")
        what = f"--prompt {args.prompt} and --tokens {args.tokens}"
        check_fits(config, size, args.prompt + args.tokens, what)

    on_gpu = args.device != "cpu"
    reader = Reader() if on_gpu else None
    settings = {"weights": "random", "quantize": args.quantize}
    with Kept(args.out, settings, gpu=on_gpu) as kept:
        for size, config in configs.items():
            for dtype in args.dtype:
                if reason := too_large(config, dtype, max(args.batch), args.device):
                    kept.skip(f"{size} {dtype}", reason)
                    continue
                model = random_model(config, dtype, args.device, args.quantize)
                for batch in args.batch:
                    # With int8 the library has no product of its own.
                    few = not args.quantize
                    there = backends(dtype, batch, args.device) if few else ["ours"]
                    for gemv in [name for name in args.gemv if name in there]:
                        for path in args.decode:
                            model.gemv = gemv
                            if path not in decode.usable(model, batch):
                                if named:
                                    title = f"{size} {dtype} batch {batch} {gemv} {path}"
                                    kept.skip(title, decode.why_not(model, batch) or "")
                                continue
                            row = {"model": size, "dtype": dtype, "batch": batch}
                            row |= {"decode": path, "gemv": gemv}
                            measure_row(model, row, args, reader)
                            kept.rows.append(row)
                del model


if __name__ == "__main__":
    main(run)
