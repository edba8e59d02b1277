"""Many texts through the public API: tokens per second in wall-clock time.

    python bench/generate.py [--model 124M] [--dtype float16] [--texts 1,16,64,256]
                             [--prompt 57] [--tokens 200] [--out FILE]

`LanguageModel.generate` continues random prompts, all at once (max_batch is their number); the
clock runs from the call to the list of completions, text included. Beside it stands the GPU's busy
time of the same requests in an engine of its own: events around what it queues for prompts, first
tokens and decode steps.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from arguments import check_fits, chosen, main, numbers, parsed, parser
from shared import DTYPES, Kept, config_of, prompts, write_checkpoint

import gpt2cupy
from gpt2cupy import LanguageModel, SamplingParams
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.timing import Timing


class Watched(Engine):
    """An engine with events around what it queues."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.marks: list[tuple[Any, Any]] = []
        running: Any = self.running
        prompts, step = running.run_prompts, running.queue_step
        # A tick without prompts queues nothing.
        running.run_prompts = lambda: self.scheduler.prompts and self._between_events(prompts)
        running.queue_step = lambda: self._between_events(step)

    def _between_events(self, queue: Any) -> Any:
        events = self.model.xp.cuda.Event(), self.model.xp.cuda.Event()
        events[0].record()
        result = queue()
        events[1].record()
        self.marks.append(events)
        return result

    def busy(self) -> float:
        """Seconds between the pairs of events."""
        self.stream.synchronize()
        elapsed = self.model.xp.cuda.get_elapsed_time
        seconds = sum(elapsed(*pair) for pair in self.marks) / 1e3
        self.marks.clear()
        return seconds


def busy_seconds(lm: LanguageModel, given: list[list[int]], params: SamplingParams) -> float:
    import numpy as np

    engine = Watched(lm.model, len(given))
    wanted = [Request(i, np.array(ids, np.int32), params) for i, ids in enumerate(given)]
    for _ in range(2):
        for _ in engine.blocks(wanted):
            pass
        seconds = engine.busy()
    return seconds


def measure(lm: LanguageModel, texts: int, args: Any) -> dict[str, Any]:
    given = prompts(lm.config, texts, args.prompt)
    # Random weights end no text early: every text has all its tokens, and ends are looked for.
    params = SamplingParams(max_new_tokens=args.tokens, temperature=0.8, top_k=0, seed=1)

    def call() -> float:
        start = time.perf_counter()
        done = lm.generate(given, params, max_batch=texts)
        seconds = time.perf_counter() - start
        counts.append(sum(len(each.tokens) for each in done))
        return seconds

    counts: list[int] = []
    call()
    wall = Timing.of([call() for _ in range(args.runs)])
    row: dict[str, Any] = {"texts": texts, "prompt": args.prompt, "tokens": counts[-1]}
    row |= {"wall": wall.as_dict(), "tokens_per_second": 1e6 * counts[-1] / wall.median_us}
    if lm.device != "cpu":
        row["busy_seconds"] = busy_seconds(lm, given, params)
        row["wall_over_busy"] = wall.median_us / 1e6 / row["busy_seconds"]
    return row


def run() -> None:
    options = parser(__doc__, "generate.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--texts", type=numbers, default=[1, 4, 16, 64, 256])
    options.add_argument("--prompt", type=int, default=57)
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--runs", type=int, default=5)
    args = parsed(options, {"tokens": 2})
    chosen([args.dtype], DTYPES, "dtype")
    config = config_of(args.model)
    check_fits(config, args.model, args.prompt + args.tokens, "--prompt and --tokens")
    on_gpu = args.device != "cpu"
    settings = {"model": args.model, "dtype": args.dtype, "weights": "random"}
    with tempfile.TemporaryDirectory() as name, Kept(args.out, settings, gpu=on_gpu) as kept:
        write_checkpoint(Path(name), config, args.dtype)
        with gpt2cupy.load(name, device=args.device) as lm:
            for texts in args.texts:
                row = measure(lm, texts, args)
                kept.rows.append(row)
                line = f"{texts} texts: {row['tokens_per_second']:.0f} tokens/s"
                if on_gpu:
                    line += f", wall / GPU busy {row['wall_over_busy']:.3f}"
                print(line, flush=True)


if __name__ == "__main__":
    main(run)
