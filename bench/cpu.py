"""Decode speed of the NumPy engine beside Hugging Face's on the CPU: 124M shape, fp32, batch 1.

    python bench/cpu.py [--rounds 7] [--tokens 48] [--threads 2] [--out FILE]

Every engine is a process of its own with the same random weights, prompt and
thread count; they run in turn, one at a time, again and again, so that a busy
machine slows all of them alike. Hugging Face runs eager and sdpa attention,
each through generate() and through a bare loop over its cache; its best counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PROMPT, SEED = 32, 0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
HUGGING_FACE = ("eager", "sdpa")
# A run returns the chosen ids and the clock before the prompt and after each token.
Run = Callable[[list[int], int], tuple[list[int], list[float]]]


def ours(folder: str) -> dict[str, Run]:
    import numpy as np

    from gpt2cupy import GPT2, SamplingParams
    from gpt2cupy.engine import Engine, Request

    engine = Engine(GPT2.from_pretrained(folder, device="cpu"), 1)

    def run(prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        # The engine computes one step ahead of the token it hands out, so the last
        # token costs nothing: ask for one more and leave it.
        params = SamplingParams(max_new_tokens=tokens + 1)
        request = Request(0, np.asarray(prompt, np.int32), params)
        times, ids = [time.perf_counter()], []
        for token in engine.run([request]):
            times.append(time.perf_counter())
            ids.append(token.id)
        return ids[:tokens], times[: tokens + 1]

    return {"gpt2cupy": run}


def hugging_face(folder: str, attention: str, threads: int) -> dict[str, Run]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    model = transformers.GPT2LMHeadModel.from_pretrained(folder, attn_implementation=attention)
    model = model.float().eval()

    @torch.inference_mode()
    def loop(prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        times, ids = [time.perf_counter()], []
        fed, past = torch.tensor([prompt]), None
        for _ in range(tokens):
            out = model(fed, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, fed = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            ids.append(int(fed))
            times.append(time.perf_counter())
        return ids, times

    class Clock(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    @torch.inference_mode()
    def generate(prompt: list[int], tokens: int) -> tuple[list[int], list[float]]:
        clock, ids = Clock(), torch.tensor([prompt])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            streamer=clock,
            pad_token_id=0,
            eos_token_id=None,
        )
        return found[0, len(prompt) :].tolist(), clock.times  # the first is the prompt's

    return {f"transformers {attention} loop": loop, f"transformers {attention} generate": generate}


def worker(name: str, folder: str, threads: int) -> None:
    """Answer each line "run tokens" on stdin with the ids and speeds of one continuation."""
    answers, sys.stdout = sys.stdout, sys.stderr
    runs = ours(folder) if name == "gpt2cupy" else hugging_face(folder, name, threads)
    prompt = [(7919 * place + 13) % 50257 for place in range(PROMPT)]
    print(json.dumps(list(runs)), file=answers, flush=True)
    for line in sys.stdin:
        key, tokens = json.loads(line)
        ids, times = runs[key](prompt, tokens)
        result = {
            "ids": ids,
            "prefill_ms": (times[1] - times[0]) * 1e3,
            "tokens_per_second": (len(times) - 2) / (times[-1] - times[1]),
        }
        print(json.dumps(result), file=answers, flush=True)


class Worker:
    """One engine's process."""

    def __init__(self, name: str, folder: str, threads: int) -> None:
        command = [sys.executable, __file__, "--worker", name, "--folder", folder]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {variable: str(threads) for variable in THREAD_VARIABLES}
        self.process = subprocess.Popen(
            [*command, "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings | {"PYTHONPATH": path},
        )
        self.keys: list[str] = self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"a worker ended: exit status {self.process.wait()}")
        return json.loads(line)

    def run(self, key: str, tokens: int) -> dict[str, Any]:
        assert self.process.stdin
        print(json.dumps([key, tokens]), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.communicate()


def write_model(folder: Path) -> None:
    """A checkpoint of the 124M shape with random weights, in Hugging Face's layout."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    from builders import write_checkpoint

    from gpt2cupy import GPT2Config

    write_checkpoint(folder, GPT2Config.from_name("gpt2"), SEED)


def measure(rounds: int, tokens: int, threads: int) -> dict[str, list[dict[str, Any]]]:
    """All runs of every engine, in rounds of one run each."""
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder))
        workers = [Worker(name, folder, threads) for name in ("gpt2cupy", *HUGGING_FACE)]
        owners = {key: worker for worker in workers for key in worker.keys}
        for key, owner in owners.items():
            owner.run(key, 4)
        runs: dict[str, list[dict[str, Any]]] = {key: [] for key in owners}
        for number in range(rounds):
            order = list(owners) if number % 2 == 0 else list(owners)[::-1]
            for key in order:
                runs[key].append(owners[key].run(key, tokens))
        for running in workers:
            running.close()
    return runs


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians of every engine, and ours against Hugging Face's best."""
    engines = {}
    for key, found in runs.items():
        speeds = [run["tokens_per_second"] for run in found]
        engines[key] = {
            "tokens_per_second": round(statistics.median(speeds), 2),
            "fastest_tokens_per_second": round(max(speeds), 2),
            "prefill_ms": round(statistics.median(run["prefill_ms"] for run in found), 2),
        }
    own = engines["gpt2cupy"]["tokens_per_second"]
    theirs = {key: value for key, value in engines.items() if key != "gpt2cupy"}
    best = max(theirs, key=lambda key: theirs[key]["tokens_per_second"])
    return {
        "engines": engines,
        "best_of_transformers": best,
        "ratio_to_best": round(own / theirs[best]["tokens_per_second"], 3),
        "same_ids": len({tuple(run["ids"]) for found in runs.values() for run in found}) == 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "cpu.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.folder, args.threads)
        return
    shape = {"prompt_tokens": PROMPT, "new_tokens": args.tokens, "threads": args.threads}
    results = {"model": "124M shape, random weights", "dtype": "float32", "batch": 1} | shape
    results |= {"rounds": args.rounds} | summary(measure(args.rounds, args.tokens, args.threads))
    print(f"{'engine':<32}{'tokens/s':>10}{'fastest':>10}{'prefill ms':>12}")
    for key, row in results["engines"].items():
        print(
            f"{key:<32}{row['tokens_per_second']:>10.2f}{row['fastest_tokens_per_second']:>10.2f}"
            f"{row['prefill_ms']:>12.1f}"
        )
    print(f"gpt2cupy / {results['best_of_transformers']}: {results['ratio_to_best']:.3f}")
    print(f"the same ids from all: {results['same_ids']}")
    from gpt2cupy import record

    record.write(args.out, results, gpu=False)


if __name__ == "__main__":
    main()
