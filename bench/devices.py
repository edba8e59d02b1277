"""Two GPUs of one machine: the same text from both, and what one model costs the other.

    python bench/devices.py [--model 124M] [--dtype float16] [--tokens 200] [--out FILE]

The same weights are loaded on cuda:0 and cuda:1. Texts and log-probabilities of both are compared
bit by bit. Then one text at a time is generated on each device alone, on both at once in two
threads of a process, and on both at once in two processes; speeds are in wall-clock time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import chosen, main, parsed, parser
from shared import DTYPES, config_of, prompts, write_checkpoint

import gpt2cupy
from gpt2cupy import LanguageModel, record
from gpt2cupy.errors import InputError
from gpt2cupy.ops.core.device import cupy_module

DEVICES = ("cuda:0", "cuda:1")
BATCHES = (1, 4, 32)


def rates(lm: LanguageModel, tokens: int, seconds: float) -> list[float]:
    """Tokens per second of one text after another, for some seconds."""
    prompt = prompts(lm.config, 1, 57)[0]
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        count = len(lm.generate(prompt, max_new_tokens=tokens, eos_token_id=-1).tokens)
        found.append(count / (time.perf_counter() - start))
    return found


def together(calls: list[Callable[[], Any]]) -> list[Any]:
    """What calls return that begin at the same time, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)
    ready = threading.Barrier(len(calls))

    def run(index: int) -> None:
        ready.wait()
        results[index] = calls[index]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def same_bits(models: list[LanguageModel], tokens: int) -> dict[str, bool]:
    """Whether both models give the same texts and log-probabilities, by number of texts."""
    same = {}
    for batch in BATCHES:
        given = prompts(models[0].config, batch, 57)
        options: Any = {"max_new_tokens": tokens, "temperature": 0.8, "seed": 1, "max_batch": batch}
        found = [
            [(each.tokens, each.logprobs) for each in lm.generate(given, **options)]
            for lm in models
        ]
        same[str(batch)] = found[0] == found[1]
    return same


def process(folder: str, device: str, tokens: int, seconds: float) -> subprocess.Popen[str]:
    options = ["--one", f"{folder},{device},{tokens},{seconds}"]
    command = [sys.executable, __file__, *options]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def in_processes(folder: str, tokens: int, seconds: float) -> list[list[float]]:
    """Rates of both devices at once, each in a process of its own that is warm before it begins."""
    started = [process(folder, device, tokens, seconds) for device in DEVICES]
    for each in started:
        assert each.stdout is not None
        each.stdout.readline()  # it is ready
    for each in started:
        assert each.stdin is not None
        print("go", file=each.stdin, flush=True)
    answers = [json.loads(each.communicate()[0]) for each in started]
    for answer in answers:
        record.add_loaded(answer["loaded"])
    return [answer["rates"] for answer in answers]


def one(job: str) -> None:
    """The process of one device: says that it is ready, waits, and writes its rates."""
    folder, device, tokens, seconds = job.split(",")
    with gpt2cupy.load(folder, device=device) as lm:
        rates(lm, int(tokens), 0.5)
        print("ready", flush=True)
        sys.stdin.readline()
        answer = {"rates": rates(lm, int(tokens), float(seconds)), "loaded": record.loaded()}
    print(json.dumps(answer), flush=True)


def run() -> None:
    options = parser(__doc__, "devices.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--seconds", type=float, default=4.0)
    options.add_argument("--one", help=argparse.SUPPRESS)
    args = parsed(options)
    if args.one:
        one(args.one)
        return
    chosen([args.dtype], DTYPES, "dtype")
    count = cupy_module().cuda.runtime.getDeviceCount()
    if count < len(DEVICES):
        raise InputError(
            f"this machine has {count} GPU",
            where="devices.py",
            remedy="Run it where there are two.",
        )
    results: dict[str, Any] = {"model": f"{args.model}, {args.dtype}, random", "gpus": count}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config_of(args.model), args.dtype)
        models = [gpt2cupy.load(folder, device=device) for device in DEVICES]
        results["same_bits"] = same_bits(models, args.tokens)
        for lm in models:
            rates(lm, args.tokens, 0.5)
        alone = [rates(lm, args.tokens, args.seconds) for lm in models]
        threads = together(
            [lambda lm=lm: rates(lm, args.tokens, args.seconds) for lm in models]  # type: ignore[misc]
        )
        for lm in models:
            lm.close()
        processes = in_processes(folder, args.tokens, args.seconds)
    found = {"alone": alone, "two threads": threads, "two processes": processes}
    for name, pair in found.items():
        medians = [float(np.median(each)) for each in pair]
        results[name] = {"tokens_per_second": medians}
        if name != "alone":
            before = results["alone"]["tokens_per_second"]
            shares = [a / b for a, b in zip(medians, before, strict=True)]
            results[name]["over_alone"] = shares
        print(f"{name}: {', '.join(f'{m:.0f}' for m in medians)} tokens/s", flush=True)
    print(f"same bits: {results['same_bits']}")
    record.write(args.out, results, gpu=True)


if __name__ == "__main__":
    main(run)
