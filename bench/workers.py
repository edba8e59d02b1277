"""Engines as processes of their own, run in turn on one device."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.record import ROOT
from gpt2cupy.timing import Timing

PEERS = Path(__file__).resolve().parent / "peers"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class EngineError(Gpt2CupyError):
    """What an engine answered instead of a result."""


@dataclass(frozen=True)
class Spec:
    """An engine of a comparison: its script in bench/peers and its own options of a job."""

    script: str
    options: dict[str, Any] = field(default_factory=dict)
    warmup: int = 2  # whole runs before the measured ones; 0 is a few tokens, if none compiles


class Worker:
    """One engine's process."""

    def __init__(self, script: str, threads: int | None = None) -> None:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        settings = {name: str(threads) for name in THREAD_VARIABLES if threads}
        self.versions: dict[str, str] = {}
        self.process = subprocess.Popen(
            [sys.executable, PEERS / f"{script}.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | settings | {"PYTHONPATH": path},
        )

    def wait_ready(self) -> None:
        self.versions = self._answer()["versions"]

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer says how it ended
            print(json.dumps(job), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise EngineError(f"the process ended with exit status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class Comparison:
    """Engines that stay up, each in its process, while jobs go through all of them.

    Parameters
    ----------
    specs : mapping of name to Spec
    threads : int, optional
        Of every engine on the CPU.
    """

    def __init__(self, specs: Mapping[str, Spec], threads: int | None = None) -> None:
        self.specs = dict(specs)
        self.failed: dict[str, str] = {}  # engines that never started
        self.workers = {name: Worker(spec.script, threads) for name, spec in specs.items()}
        for name, worker in list(self.workers.items()):
            try:
                worker.wait_ready()
            except EngineError as error:
                self.failed[name] = str(error)
                self.workers.pop(name).close()

    def __enter__(self) -> Comparison:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()

    def run(self, job: dict[str, Any], rounds: int) -> dict[str, Any]:
        """One job through every engine: ``rounds`` runs each, in turn.

        Returns
        -------
        dict
            ``engines``: name -> figures of each that ran; ``skipped``: name -> why not.
        """
        skipped = dict(self.failed)
        ready: dict[str, dict[str, Any]] = {}
        runs: dict[str, list[dict[str, Any]]] = {}
        for name, worker in self.workers.items():
            spec = self.specs[name]
            warmup = [job["tokens"]] * spec.warmup or [min(8, job["tokens"])]
            try:
                request = {"do": "prepare", "warmup": warmup} | job | spec.options
                ready[name] = worker.ask(request) | {"versions": worker.versions}
                runs[name] = []
            except EngineError as error:
                skipped[name] = str(error)
        for number in range(rounds):
            # There and back again, so that a clock that drifts favours none.
            for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                try:
                    answer = self.workers[name].ask({"do": "run", "tokens": job["tokens"]})
                    runs[name].append(answer)
                except EngineError as error:
                    skipped[name] = str(error)
                    del runs[name]
        engines = {name: figures(ready[name], runs[name]) for name in runs}
        count_same_tokens(engines, runs)
        return {"engines": engines, "skipped": skipped}


def figures(ready: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Timings over the runs of one engine."""
    return ready | {
        "step": Timing.of([run["us_per_step"] / 1e6 for run in runs]).as_dict(),
        "prefill": Timing.of([run["prefill_ms"] / 1e3 for run in runs]).as_dict(),
    }


def count_same_tokens(
    engines: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]
) -> None:
    """Note with each engine how many of the first one's tokens it begins with."""
    reference = next(iter(runs.values()))[0]["ids"] if runs else []
    for name, found in engines.items():
        count = 0
        for ours, theirs in zip(runs[name][0]["ids"], reference, strict=False):
            if ours != theirs:
                break
            count += 1
        found["same_tokens"] = count if runs[name][0]["ids"] else None  # it did not say
