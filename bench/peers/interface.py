"""The one interface of every engine that is timed beside the others.

An engine is a process. It writes one line of JSON when it is ready, and answers
each line on stdin with one line:

    {"do": "prepare", "folder": ..., "dtype": ..., "batch": ..., "prompts": [[id, ...], ...],
     "tokens": ..., "device": ..., "warmup": [tokens, ...], ...}
        -> {"load_s": ..., "first_run_s": ..., ...}
    {"do": "run", "tokens": ...}
        -> {"prefill_ms": ..., "us_per_step": ..., "ids": [...]}
    {"do": "loaded"}
        -> {"files": {...}, "cubins": {...}}

``prepare`` loads the checkpoint, compiles, and runs once for each number in
``warmup``. A run continues all prompts greedily; ``ids`` are those of the first.
``loaded`` is asked after the runs: what of gpt2cupy a record depends on, nothing in other engines.
What cannot be done is answered with {"error": why}.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]
# Given the number of tokens: the ids of the first prompt, and the clock at the start, after the
# first token of every prompt, and after the last.
Run = Callable[[int], tuple[list[int], float, float, float]]


def serve(packages: tuple[str, ...], prepare: Callable[[Job], tuple[Run, dict[str, Any]]]) -> None:
    """Answer jobs until stdin ends; whatever else is printed goes to stderr."""
    # By its descriptor, so that libraries and processes they start cannot write among answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(line: dict[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    answer({"versions": {name: importlib.metadata.version(name) for name in packages}})
    run: Run | None = None
    for line in sys.stdin:
        job = json.loads(line)
        try:
            if job["do"] == "prepare":
                run = None  # frees what the last job held
                run, reply = _prepare(job, prepare)
                answer(reply)
            elif job["do"] == "loaded":
                answer(_loaded())
            else:
                assert run, "prepare first"
                answer(_figures(run, job["tokens"]))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})


def _loaded() -> dict[str, dict[str, str]]:
    if "gpt2cupy" not in sys.modules:
        return {"files": {}, "cubins": {}}
    from gpt2cupy import record

    return record.loaded()


def _prepare(job: Job, prepare: Callable[[Job], Any]) -> tuple[Run, dict[str, Any]]:
    start = time.perf_counter()
    run, about = prepare(job)
    loaded = time.perf_counter()
    seconds = []
    for tokens in job["warmup"]:
        begin = time.perf_counter()
        run(tokens)
        seconds.append(time.perf_counter() - begin)
    first = {"first_run_s": seconds[0]} if seconds else {}
    return run, {"load_s": loaded - start} | first | about


def _figures(run: Run, tokens: int) -> dict[str, Any]:
    ids, start, first, last = run(tokens)
    return {
        "prefill_ms": (first - start) * 1e3,
        "us_per_step": (last - first) * 1e6 / max(tokens - 1, 1),
        "ids": ids,
    }
