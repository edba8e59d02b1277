"""Thousands of mixed requests in one process must leave memory where it was.

    python bench/soak.py [--model tiny] [--requests 10000] [--warmup 1000] [--out FILE]

--model is "tiny" (random weights), another size of shared.py, or a checkpoint. Prompts, lengths
and sampling settings are drawn by a fixed seed; requests come as lists, as streams, as engine
batches whose requests differ, some are left before their end and some fail. What the process
holds is counted every --warmup requests: the first count is what the last is compared with,
since by then every engine, graph and buffer has been needed once. The exit code is 1 if
something grew by more than ALLOWED.
"""

from __future__ import annotations

import gc
import itertools
import math
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from arguments import main, parsed, parser
from shared import SIZES, config_of, write_checkpoint

from gpt2cupy import LanguageModel, SamplingParams, load, record
from gpt2cupy.decode.prompt import BUCKETS
from gpt2cupy.errors import BusyError, InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.prefixes import BLOCK
from gpt2cupy.generation.request import Request

# What may grow between the first count and the last, and why it may grow at all.
ALLOWED = {
    "host_bytes": 8 << 20,  # what malloc leaves in its pools; under 1 kB a request
    "objects": 500,  # of Python, cycles collected; one in 18 requests
    "threads": 0,
    "files": 0,
    "pool_used_bytes": 0,  # arrays on the GPU: the same ones are alive after every request
    "pool_total_bytes": 1 << 20,  # what CuPy keeps besides: it may split a block another way
    "device_bytes": 4 << 20,  # the driver hands out pages of 2 MiB
}
SLOTS = 16
STYLES: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.9},
    {"temperature": 1.0, "min_p": 0.05, "logprobs": 3},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"temperature": 0.8, "frequency_penalty": 0.4, "logit_bias": {5: 2.0, 9: -2.0}},
    {"min_new_tokens": 2, "logprobs": 1},
    {"temperature": 1.2, "stop": ("e", "ab")},
)


def shapes(longest: int, most: int) -> Iterator[list[int]]:
    """Lengths of prompts that meet every shape for which a graph is captured.

    Those of decode/prompt.py: tokens in all by BUCKETS, sequences and the longest by powers of
    four.

    Parameters
    ----------
    longest : int
        Tokens of a prompt at most.
    most : int
        Prompts at once.
    """
    seen = set()
    for fewest, rows in itertools.pairwise((0, *BUCKETS)):
        for count in range(1, most + 1):
            for power in range(6):
                top = min(4**power, longest)
                total = min(rows, count * top)
                top = min(top, total - count + 1)
                shape = rows, *(math.ceil(math.log(n, 4)) for n in (count, max(top, 1)))
                if top < 1 or total <= fewest or shape in seen:
                    continue
                seen.add(shape)
                rest = np.array_split(range(total - top), count - 1) if count > 1 else []
                yield [top, *(len(part) for part in rest)]


class Load:
    """Draws requests for a model and sends them.

    Parameters
    ----------
    lm : LanguageModel
    seed : int

    Attributes
    ----------
    counts : Counter
        Requests by the way they were sent.
    """

    # Each with the method that sends it and how often it is taken. A list or a batch is several
    # requests: they are most of them all the same.
    WAYS: ClassVar[dict[str, tuple[str, float]]] = {
        "list": ("as_list", 0.12),
        "stream": ("as_stream", 0.4),
        "stream left": ("leave_stream", 0.15),
        "engine": ("in_engine", 0.06),
        "engine left": ("leave_engine", 0.04),
        "failed": ("fail", 0.15),
        "scored": ("score", 0.08),
    }

    def __init__(self, lm: LanguageModel, seed: int = 0) -> None:
        self.lm, self.rng, self.counts = lm, np.random.default_rng(seed), Counter[str]()
        self.context, self.vocab = lm.config.n_positions, lm.config.vocab_size
        self.engine = Engine(lm.model, SLOTS // 2)

    def meet_every_length(self) -> None:
        """Run each length that has a graph, or products remembered, of its own.

        Later it would be growth, though one that ends.
        """
        once = SamplingParams(max_new_tokens=1)
        self.lm.generate([[0]] * SLOTS, once, max_batch=SLOTS)  # the largest engine there will be
        for lengths in shapes(self.context - 1, SLOTS):
            # Of a beginning that they shared only one would run.
            prompts = [[first] + [0] * (length - 1) for first, length in enumerate(lengths)]
            # The first token of a single prompt is chosen in its graph, by its style's kernels.
            for style in STYLES if len(lengths) == 1 else ({},):
                wanted: dict[str, Any] = {"max_new_tokens": 1} | style
                wanted.pop("min_new_tokens", None)
                self.lm.generate(prompts, SamplingParams(**wanted), max_batch=SLOTS)
            if len(lengths) == 1:  # alone in the engine of several: behind tokens that it shares
                twice = SamplingParams(max_new_tokens=1, temperature=1.0, n=2)
                self.lm.generate(prompts, twice, max_batch=SLOTS)
                both = [[0] * BLOCK, [0] * BLOCK + [1] * lengths[0]]
                if len(both[1]) < self.context:
                    self.lm.generate(both, once, max_batch=SLOTS)
            if len(lengths) <= self.engine.slots:
                ids = (np.array(prompt, np.int32) for prompt in prompts)
                list(self.engine.run([Request(key, each, once) for key, each in enumerate(ids)]))
        for length in range(1, self.context + 1):
            self.lm.score([0] * length)

    def send(self, requests: int) -> None:
        """Send at least that many."""
        end = self.counts.total() + requests
        while self.counts.total() < end:
            way = str(self.rng.choice([*self.WAYS], p=[share for _, share in self.WAYS.values()]))
            self.counts[way] += getattr(self, self.WAYS[way][0])()

    def prompt(self) -> list[int]:
        """Mostly short, sometimes up to the context."""
        most = self.context - 1 if self.rng.random() < 0.05 else min(64, self.context // 2)
        return self.rng.integers(0, self.vocab, self.rng.integers(1, most + 1)).tolist()

    def params(self, longest: int, **more: Any) -> SamplingParams:
        tokens = int(min(self.rng.integers(2, 17), self.context - longest + 1))
        style = dict(STYLES[self.rng.integers(len(STYLES))])
        if tokens < 2:
            style.pop("min_new_tokens", None)
        # Drawn for every request, so that the others do not depend on who uses it.
        seed = int(self.rng.integers(2**31))
        wanted: dict[str, Any] = {"max_new_tokens": tokens, "seed": seed} | style | more
        if not wanted.get("temperature"):  # greedy: there is nothing to draw
            del wanted["seed"]
            wanted.pop("n", None)
        return SamplingParams(**wanted)

    def as_list(self) -> int:
        prompts = [self.prompt() for _ in range(self.rng.integers(1, SLOTS + 5))]
        params = self.params(max(map(len, prompts)), n=int(self.rng.integers(1, 3)))
        self.lm.generate(prompts, params, max_batch=int(self.rng.integers(1, SLOTS + 1)))
        return params.n * len(prompts)

    def as_stream(self) -> int:
        prompt = self.prompt()
        text = "".join("ab" for _ in prompt[:8]) if len(prompt) % 4 == 0 else prompt
        for _ in self.lm.stream(text, self.params(len(prompt))):
            pass
        return 1

    def leave_stream(self) -> int:
        """Closed by name, or dropped."""
        prompt = self.prompt()
        stream = self.lm.stream(prompt, self.params(len(prompt)))
        next(stream)
        if self.rng.random() < 0.5:
            stream.close()
        return 1

    def requests(self) -> list[Request]:
        found = []
        for key in range(self.rng.integers(1, SLOTS)):
            prompt = np.array(self.prompt(), np.int32)
            eos = -1 if self.lm.config.eos_token_id is None else self.lm.config.eos_token_id
            found.append(Request(key, prompt, self.params(len(prompt)), eos=eos))
        return found

    def in_engine(self) -> int:
        requests = self.requests()
        for token in self.engine.run(requests):
            if token.id % 50 == 0:
                self.engine.cancel(token.key)
        return len(requests)

    def leave_engine(self) -> int:
        requests = self.requests()
        tokens = self.engine.run(requests)
        next(tokens)
        tokens.close()
        return len(requests)

    def fail(self) -> int:
        prompt = self.prompt()
        wrong: list[Callable[[], Any]] = [
            lambda: self.lm.generate([0] * (self.context + 1)),
            lambda: self.lm.generate([*prompt, self.vocab]),
            lambda: self.lm.generate([prompt, []], max_new_tokens=self.context + 1),
            lambda: self.lm.generate(prompt, temperature=-1.0),
            lambda: self.lm.generate(prompt, self.params(len(prompt), logit_bias={self.vocab: 1})),
            self.ask_twice,
        ]
        try:
            wrong[self.rng.integers(len(wrong))]()
        except (InputError, BusyError):
            return 1
        raise AssertionError("a request that had to fail did not")

    def ask_twice(self) -> None:
        stream = self.lm.stream([1], max_new_tokens=3)
        next(stream)
        try:
            self.lm.generate([1])
        finally:
            stream.close()

    def score(self) -> int:
        self.lm.score([*self.prompt(), 1])
        return 1


def held(gpu: bool) -> dict[str, int]:
    """What the process holds now, by the names of ALLOWED; host figures where /proc is."""
    gc.collect()
    found = {"objects": len(gc.get_objects())}
    own = Path("/proc/self")
    if own.is_dir():
        status = dict(line.split(":", 1) for line in (own / "status").read_text().splitlines())
        found["host_bytes"] = 1024 * int(status["VmRSS"].split()[0])
        found["threads"] = int(status["Threads"])
        found["files"] = sum(1 for _ in (own / "fd").iterdir())
    if gpu:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        pool, (free, total) = cupy.get_default_memory_pool(), cupy.cuda.runtime.memGetInfo()
        found |= {"pool_used_bytes": pool.used_bytes(), "pool_total_bytes": pool.total_bytes()}
        found["device_bytes"] = total - free
    return found


def too_much(growth: dict[str, int]) -> list[str]:
    """What grew by more than it may."""
    return [
        f"{name} grew by {by:,}, {ALLOWED[name]:,} are allowed"
        for name, by in growth.items()
        if by > ALLOWED[name]
    ]


def soak(lm: LanguageModel, requests: int, every: int, gpu: bool) -> dict[str, Any]:
    """Send requests, counting what is held after each ``every`` of them."""
    work, rows = Load(lm), []
    work.meet_every_length()
    start = time.perf_counter()
    while not rows or rows[-1]["requests"] < requests:
        work.send(min(every, requests - (rows[-1]["requests"] if rows else 0)))
        rows.append({"requests": work.counts.total()} | held(gpu))
        print(f"[{time.perf_counter() - start:6.1f} s] {rows[-1]}", file=sys.stderr, flush=True)
    growth = {name: rows[-1][name] - rows[0][name] for name in ALLOWED if name in rows[0]}
    return {
        "rows": rows, "counts": dict(work.counts), "seconds": time.perf_counter() - start,
        "growth": growth, "allowed": {name: ALLOWED[name] for name in growth},
        "failed": too_much(growth),
    }  # fmt: skip


def run() -> None:
    options = parser(__doc__, "soak.json")
    options.add_argument("--model", default="tiny")
    options.add_argument("--requests", type=int, default=10_000)
    options.add_argument("--warmup", type=int, default=1000, help="requests between two counts")
    args = parsed(options)
    gpu = args.device != "cpu"
    with tempfile.TemporaryDirectory() as folder:
        where = args.model
        if args.model in (*SIZES, "tiny"):
            where = folder
            dtype = "float16" if gpu else "float32"
            write_checkpoint(Path(folder), config_of(args.model), dtype)
        lm = load(where, device=args.device)
    with lm:
        found = soak(lm, args.requests, args.warmup, gpu)
        settings = {"model": args.model, "dtype": str(lm.dtype), "decode": lm.model.decode_path}
    record.write(args.out, settings | found, gpu=gpu)
    print(*found["failed"] or ["nothing grew beyond what is allowed"], sep="\n")
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main(run)
