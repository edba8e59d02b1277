"""Engines as processes of their own, run in turn on one device."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpt2cupy import record
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
    needs: tuple[str, ...] = ()  # modules, or programs on PATH


def not_installed(spec: Spec) -> str:
    """What of an engine's needs is missing, or nothing."""
    missing = [n for n in spec.needs if not (importlib.util.find_spec(n) or shutil.which(n))]
    return f"{' and '.join(missing)} not installed" if missing else ""


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
        self.versions = self.receive()["versions"]

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        self.send(job)
        return self.receive()

    def send(self, job: dict[str, Any]) -> None:
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):  # the answer says how it ended
            print(json.dumps(job), file=self.process.stdin, flush=True)

    def receive(self) -> dict[str, Any]:
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
    together : bool
        Prepare all engines of a job at the same time: quicker, but then the times of loading
        and of the first run mean nothing.
    """

    def __init__(
        self, specs: Mapping[str, Spec], threads: int | None = None, *, together: bool = False
    ) -> None:
        self.specs, self.together, self.began = dict(specs), together, time.perf_counter()
        # Engines that never started.
        self.failed = {n: why for n, spec in specs.items() if (why := not_installed(spec))}
        self.workers = {
            name: Worker(spec.script, threads)
            for name, spec in specs.items()
            if name not in self.failed
        }
        for name, worker in list(self.workers.items()):
            try:
                worker.wait_ready()
            except EngineError as error:
                self.failed[name] = str(error)
                self.workers.pop(name).close()

    def say(self, what: str) -> None:
        """Tell how far it came, on stderr."""
        seconds = time.perf_counter() - self.began
        print(f"[{seconds:6.1f} s] {what}", file=sys.stderr, flush=True)

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
        for name, worker in self.workers.items():
            spec = self.specs[name]
            warmup = [job["tokens"]] * spec.warmup or [min(8, job["tokens"])]
            worker.send({"do": "prepare", "warmup": warmup} | job | spec.options)
            if not self.together:
                self._await(name, ready, skipped)
        for name in self.workers if self.together else ():
            self._await(name, ready, skipped)
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ready}
        for number in range(rounds):
            # There and back again, so that a clock that drifts favours none.
            for name in list(runs) if number % 2 == 0 else list(runs)[::-1]:
                try:
                    answer = self.workers[name].ask({"do": "run", "tokens": job["tokens"]})
                    runs[name].append(answer)
                    self.say(f"{name}: {answer['us_per_step']:.0f} us a step")
                except EngineError as error:
                    skipped[name] = str(error)
                    del runs[name]
        for name in runs:
            record.add_loaded(self.workers[name].ask({"do": "loaded"}))
        engines = {name: figures(ready[name], runs[name]) for name in runs}
        count_same_tokens(engines, runs)
        return {"engines": engines, "skipped": skipped}

    def _await(self, name: str, ready: dict[str, dict[str, Any]], skipped: dict[str, str]) -> None:
        """Wait until an engine is prepared."""
        worker = self.workers[name]
        try:
            ready[name] = worker.receive() | {"versions": worker.versions}
            self.say(f"{name}: ready")
        except EngineError as error:
            skipped[name] = str(error)


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
