"""A file of requests through `LanguageModel.batch`: tokens per second in wall-clock time.

    python bench/batch.py [--model 124M] [--dtype float16] [--requests 4096] [--prompt 128]
                          [--tokens 128] [--max-batch 256] [--out FILE]

The clock runs from the call to its return: requests are read and encoded, texts are generated,
decoded and written as JSON. Two kinds of requests: plain ones, and ones with a stop string that is
looked for in every text and the log-probabilities of the 5 most probable tokens. Beside each stands
what the host alone takes: the same call with an engine whose steps cost nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, parsed, parser
from shared import DTYPES, Kept, config_of, write_checkpoint
from words import texts, write_words

import gpt2cupy
from gpt2cupy import LanguageModel
from gpt2cupy.generation.request import Request
from gpt2cupy.generation.results import Block, Results
from gpt2cupy.timing import Timing

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stop and logprobs": {"stop": "\nQ:", "logprobs": 5},
}


def write_requests(path: Path, prompts: list[str], tokens: int, more: dict[str, Any]) -> None:
    with path.open("w") as file:
        for number, prompt in enumerate(prompts):
            body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.8, "seed": number}
            line = {"custom_id": f"request-{number}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(line | {"body": body | more}) + "\n")


def free_blocks(requests: Iterable[Request | None], slots: int) -> Iterator[Block]:
    """What :meth:`Session.blocks` gives, of an engine whose steps cost nothing."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 50000, (64, slots), np.int32)
    top = rng.integers(0, 50000, (64, slots, 5), np.int32)
    logprobs = -rng.random((64, slots, 5), np.float32)
    source, more, step = iter(requests), True, 0
    results, running = Results(1025), []
    while True:
        while more and len(running) < slots:
            request = next(source, 0)
            more = request != 0
            if not isinstance(request, Request):
                break
            running.append(results.open(request, request.params.limit(1024)))
        if not running and not more:
            return
        step, count = step + 1, len(running)
        turn = step % 64
        numbers = np.array(running, np.int64)
        tops = None
        if count and results.tops[numbers].any():
            tops = top[turn, :count], logprobs[turn, :count]
        block = results.add(numbers, ids[turn, :count], logprobs[turn, :count, 0], tops)
        if block.finished:
            alive = results.alive[numbers].tolist()
            for number, live in zip(running, alive, strict=True):
                if not live:
                    results.close(number)
            running = [number for number, live in zip(running, alive, strict=True) if live]
        yield block


class FreeEngine:
    """A session whose engine costs nothing, in place of a model's own."""

    def __init__(self, lm: LanguageModel) -> None:
        self._lm, self._own = lm, lm._session

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def blocks(self, requests: Iterable[Request | None], slots: int) -> Iterator[Block]:
        return free_blocks(requests, slots)

    def cancel(self, key: Any) -> None:
        pass

    def __enter__(self) -> None:
        self._lm._session = self  # type: ignore[assignment]

    def __exit__(self, *exception: object) -> None:
        self._lm._session = self._own


def call(lm: LanguageModel, requests: Path, max_batch: int) -> tuple[float, Any]:
    """Seconds of a batch, and its summary."""
    answers = requests.with_suffix(".answers")
    answers.unlink(missing_ok=True)
    start = time.perf_counter()
    found = lm.batch(requests, answers, max_batch=max_batch, progress=False)
    seconds = time.perf_counter() - start
    assert not found.failed and not found.before
    return seconds, found


def measure(lm: LanguageModel, folder: Path, kind: str, args: Any) -> dict[str, Any]:
    requests = folder / "requests.jsonl"
    few = texts(lm.tokenizer, min(args.requests, 2 * args.max_batch), args.prompt)
    write_requests(requests, few, args.tokens, KINDS[kind])
    call(lm, requests, args.max_batch)
    write_requests(
        requests, texts(lm.tokenizer, args.requests, args.prompt), args.tokens, KINDS[kind]
    )
    runs = [call(lm, requests, args.max_batch) for _ in range(args.runs)]
    wall, found = Timing.of([seconds for seconds, _ in runs]), runs[-1][1]
    with FreeEngine(lm):
        host = Timing.of([call(lm, requests, args.max_batch)[0] for _ in range(args.runs)])
    row = {"name": kind, "requests": args.requests, "max_batch": args.max_batch}
    row |= {"prompt_tokens": found.prompt_tokens, "tokens": found.completion_tokens}
    row |= {"wall": wall.as_dict(), "host": host.as_dict()}
    return row | {"tokens_per_second": 1e6 * found.completion_tokens / wall.median_us}


def run() -> None:
    options = parser(__doc__, "batch.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--requests", type=int, default=4096)
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--max-batch", type=int, default=256)
    options.add_argument("--runs", type=int, default=3)
    args = parsed(options)
    chosen([args.dtype], DTYPES, "dtype")
    config = config_of(args.model)
    check_fits(config, args.model, args.prompt + args.tokens, "--prompt and --tokens")
    settings = {"model": args.model, "dtype": args.dtype, "weights": "random"}
    gpu = args.device != "cpu"
    with tempfile.TemporaryDirectory() as name, Kept(args.out, settings, gpu=gpu) as kept:
        write_checkpoint(Path(name), config, args.dtype)
        write_words(Path(name), config.vocab_size)
        with gpt2cupy.load(name, device=args.device) as lm:
            for kind in KINDS:
                row = measure(lm, Path(name), kind, args)
                kept.rows.append(row)
                wall, host = row["wall"]["median_us"] / 1e6, row["host"]["median_us"] / 1e6
                print(
                    f"{kind}: {row['tokens_per_second']:.0f} tokens/s, {wall:.2f} s, the host "
                    f"alone {host:.2f} s ({1e6 * host / row['tokens']:.2f} us a token)",
                    flush=True,
                )


if __name__ == "__main__":
    main(run)
