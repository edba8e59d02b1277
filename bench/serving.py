"""What the benchmarks of the server share: a checkpoint, prompts, a server and its clients."""

from __future__ import annotations

import json
import os
import string
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
from shared import write_checkpoint

from gpt2cupy import GPT2Config
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT, Tokenizer

HERE = Path(__file__).resolve().parent
_START_SECONDS = 300


def write_served_checkpoint(folder: Path, config: GPT2Config, dtype: str) -> None:
    """Random weights, and a vocabulary of ASCII: like GPT-2's, nearly all tokens are whole text."""
    write_checkpoint(folder, config, dtype)
    symbols = sorted(BYTE_SYMBOLS, key=BYTE_SYMBOLS.__getitem__)
    letters = [BYTE_SYMBOLS_OF[ord(c)] for c in " " + string.ascii_lowercase + string.digits]
    others = [BYTE_SYMBOLS_OF[i] for i in range(33, 127) if BYTE_SYMBOLS_OF[i] not in letters]
    merges: list[tuple[str, str]] = [(a, b) for a in letters for b in letters]
    merges += [(a + b, c) for a, b in merges[:] for c in letters]
    merges += [(a, b) for a in others for b in letters]
    merges = merges[: max(config.vocab_size - 257, 0)]
    tokens = [*symbols, *(a + b for a, b in merges), END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(f"{a} {b}" for a, b in merges))


BYTE_SYMBOLS_OF = {byte: symbol for symbol, byte in BYTE_SYMBOLS.items()}


def text_prompts(tokenizer: Tokenizer, lengths: list[int], seed: int = 1) -> list[str]:
    """Random words, one text of exactly so many tokens for each length."""
    rng = np.random.default_rng(seed)
    letters = np.array(list(string.ascii_lowercase))

    def words(characters: int) -> str:
        text = "".join(rng.choice(letters, characters))
        places = np.cumsum(rng.integers(2, 9, characters))
        return "".join(" " + text[a:b] for a, b in zip([0, *places], places, strict=False) if a < b)

    found = []
    for length in lengths:
        text = words(4 * length)
        # A token is two or three characters here: cut where that many tokens are likely, and look.
        size = round(2.3 * length)
        while (count := len(tokenizer.encode(text[:size]))) != length:
            size += max(length - count, 1) if count < length else min(length - count, -1)
        found.append(text[:size])
    return found


def lengths_of(kind: str, mean: int, count: int, seed: int = 2) -> list[int]:
    """``equal``: all the mean. ``random``: log-normal with a deviation of half the mean."""
    if kind == "equal":
        return [mean] * count
    spread = np.sqrt(np.log(1 + 0.25))
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - spread**2 / 2, spread, count)
    return np.clip(np.rint(drawn), mean // 8 or 1, 3 * mean).astype(int).tolist()


class Server:
    """A server in processes of its own; a context manager that ends it.

    Parameters
    ----------
    *options : str
        Of ``gpt2cupy serve``.
    cache : path, optional
        Of compiled kernels, in place of the usual one.

    Attributes
    ----------
    ready_seconds : float
        From its start until ``/ready`` says so.
    """

    def __init__(self, *options: str, cache: Path | None = None) -> None:
        self.options = options
        self.cache = cache

    def __enter__(self) -> Server:
        start = time.perf_counter()
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), *sys.path])}
        if self.cache is not None:
            kept = {"GPT2CUPY_CACHE_DIR": self.cache, "CUDA_CACHE_PATH": self.cache / "cuda"}
            environment |= {name: str(folder) for name, folder in kept.items()}
        self.log = tempfile.NamedTemporaryFile("w", suffix=".log")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt2cupy", "serve", "--port", "0", "--quiet", *self.options],
            stderr=self.log,
            env=environment,
        )
        self.port = 0
        while not self.port:
            self._check(start)
            time.sleep(0.01)
            for line in self._lines():
                if " is ready on http://" in line:
                    self.port = int(line.partition("http://")[2].split()[0].rpartition(":")[2])
        self.get("/ready")
        self.ready_seconds = time.perf_counter() - start
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()

    def _lines(self) -> list[str]:
        return Path(self.log.name).read_text().splitlines()

    def _check(self, start: float) -> None:
        if self.process.poll() is None and time.perf_counter() - start < _START_SECONDS:
            return
        raise Gpt2CupyError("the server did not start: " + " | ".join(self._lines()[-5:]))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as reply:
            return reply.read().decode()

    def metric(self, name: str) -> float:
        """The value of a metric, summed over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        return sum(float(line.rpartition(" ")[2]) for line in lines)

    def processes(self) -> dict[str, int]:
        """Process ids by their parts: engine, front 0, front 1, ..., supervisor."""
        found = {"supervisor": self.process.pid}
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                stat = path.read_text()
                words = (path.parent / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if int(stat.rpartition(")")[2].split()[1]) != self.process.pid:
                continue
            if b"gpt2cupy.server.engine_process" in words:
                found["engine"] = int(path.parent.name)
            elif b"gpt2cupy.server.front_process" in words:
                found[f"front {words[3].decode()}"] = int(path.parent.name)
        return found

    def cpu_seconds(self) -> dict[str, float]:
        """CPU time that each part has used, its threads together."""
        tick = os.sysconf("SC_CLK_TCK")
        found = {}
        for name, pid in self.processes().items():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found[name] = (int(fields[11]) + int(fields[12])) / tick
        return found


def load(job: dict[str, Any], processes: int) -> dict[str, np.ndarray]:
    """Run clients in processes of their own; what they saw, all together.

    Parameters
    ----------
    job : dict
        As bench/server_client.py takes it, for all clients together.
    processes : int

    Returns
    -------
    dict of arrays
        Of each request: ``start``, ``first``, ``end`` (seconds), ``events``, ``tokens``; ``at``
        and ``gap`` of each event but the first of a request; ``errors`` [1].
    """
    processes = min(processes, job["clients"])
    with tempfile.TemporaryDirectory() as folder:
        started = []
        begin = time.monotonic() + 0.5
        for number in range(processes):
            own = range(number, job["clients"], processes)
            part = job | {
                "clients": len(own),
                "rate": job.get("rate", 0) / processes,
                "begin": begin,
                "seed": number,
                "out": f"{folder}/{number}.npz",
            }
            command = [sys.executable, str(HERE / "server_client.py")]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)
            assert process.stdin
            process.stdin.write(json.dumps(part))
            process.stdin.close()
            started.append(process)
        for process in started:
            if process.wait():
                raise Gpt2CupyError("a client process failed")
        parts = [dict(np.load(f"{folder}/{number}.npz")) for number in range(processes)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def summary(
    seen: dict[str, np.ndarray], window: tuple[float, float], limits: tuple[float, float] = (1, 1)
) -> dict[str, Any]:
    """Rates and percentiles of what clients saw within a window of time.

    ``limits`` are the seconds to a first token, and between events on average, within which a
    request counts for the goodput.
    """
    first, last = window
    inside = (seen["at"] >= first) & (seen["at"] < last)
    ended = (seen["end"] >= first) & (seen["end"] < last)
    per_event = seen["tokens"] / np.maximum(seen["events"], 1)
    tokens = float((np.repeat(per_event, seen["events"])[inside]).sum())
    gaps = seen["gap"][inside & ~np.isnan(seen["gap"])]
    mean_gap = (seen["end"] - seen["first"]) / np.maximum(seen["events"] - 1, 1)
    good = ended & (seen["first"] - seen["start"] <= limits[0]) & (mean_gap <= limits[1])
    found: dict[str, Any] = {
        "goodput": float(good.sum()) / (last - first),
        "requests": int(ended.sum()),
        "errors": int(seen["errors"].sum()),
        "tokens_per_second": tokens / (last - first),
        "events_per_second": float(inside.sum()) / (last - first),
        "tokens_per_event": float(per_event[ended].mean()) if ended.any() else 0.0,
    }
    columns = {
        "first_token_ms": (seen["first"] - seen["start"])[ended],
        "between_events_ms": gaps,
        "end_to_end_ms": (seen["end"] - seen["start"])[ended],
    }
    for name, values in columns.items():
        if len(values):
            p50, p95, p99 = np.percentile(values * 1e3, [50, 95, 99])
            found[name] = {"p50": float(p50), "p95": float(p95), "p99": float(p99)}
    return found
