"""The server's latency and speed under load, its clients in processes of their own.

    python bench/server.py [--parts ready,closed,many,open,one,baseline,norms] [--seconds 20]
                           [--row-seconds 60] [--model 124M] [--dtype float16] [--out FILE]

Prompts of 128 tokens and 128 new ones of random weights, sampled at temperature 1, streamed; what
is "random" are log-normal lengths with a deviation of half the mean. No beginning of a prompt is
kept for another: they come again, and the baseline would not profit. Parts:

ready     a server is started twice, first with an empty cache of kernels
closed    closed loop: each client sends again when it is answered; at most 2 tokens an event
many      256 clients, events of 5 ms, 4 workers
open      Poisson arrivals at several rates, and the goodput under a limit
one       one client, and the same requests through the engine in a process without a server
baseline  the same fronts over transformers' generate, waiting requests in batches of up to 32
norms     row i: 32 clients; fused norms on and off, and a step of PyTorch with two RMS norms
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from arguments import chosen, main, names, numbers, parsed, parser
from serving import HERE, Server, lengths_of, load, summary, text_prompts, write_served_checkpoint
from shared import DTYPES, Kept, config_of

from gpt2cupy import record
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.tokenizer import Tokenizer

PARTS = ("ready", "closed", "many", "open", "one", "baseline", "norms")
KINDS = ("equal", "random")
PROMPTS = 2048  # different ones
WARM = 1.0  # seconds of a load before what is counted
# Scripts with engines that go behind our fronts.
PEERS, STEPS = (HERE / "peers" / f"{name}.py" for name in ("served", "served_step"))
# Engines of row i, by the names in the table.
NORMS = {
    "ours, fused": f"{PEERS}:fused",
    "ours, unfused": f"{PEERS}:unfused",
    "PyTorch, F.rms_norm": f"{STEPS}:torch_rms",
    "PyTorch, gpt2cupy.torch.rms_norm": f"{STEPS}:torch_ours",
}


class Bench:
    """What all parts share."""

    def __init__(self, args: Any, folder: Path, kept: Kept) -> None:
        self.args, self.folder, self.kept = args, folder, kept
        self.tokenizer = Tokenizer.from_path(folder)
        self.bodies = {kind: self._bodies(kind) for kind in KINDS}

    def _bodies(self, kind: str) -> list[str]:
        count = PROMPTS
        prompts = text_prompts(self.tokenizer, lengths_of(kind, self.args.prompt, count))
        tokens = lengths_of(kind, self.args.tokens, count, seed=3)
        return [self._body(p, n) for p, n in zip(prompts, tokens, strict=True)]

    def _body(self, prompt: str, tokens: int) -> str:
        options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        return json.dumps({"prompt": prompt, "max_tokens": tokens, "temperature": 1.0} | options)

    def server(self, *options: str, cache: Path | None = None) -> Server:
        args = self.args
        return Server(
            "--model", str(self.folder), "--dtype", args.dtype, "--device", args.device,
            "--slots", str(args.slots), "--no-prefix-cache", *options, cache=cache,
        )  # fmt: skip

    def loaded(
        self, server: Server, clients: int, kind: str, *, seconds: int, rate: float = 0.0
    ) -> dict[str, Any]:
        """What clients saw of a server."""
        before, hits = server.cpu_seconds(), server.metric("vllm:prefix_cache_hits_total")
        job: dict[str, Any] = {"port": server.port, "bodies": self.bodies[kind], "rate": rate}
        job |= {"clients": clients, "seconds": seconds + WARM}
        seen = load(job, self.args.processes)
        after = server.cpu_seconds()
        begin = float(seen["start"].min())
        end = float(seen["end"].max())
        cpu = {name: (s - before.get(name, 0)) / (end - begin) for name, s in after.items()}
        row = {"clients": clients, "lengths": kind, "cpu": cpu}
        row["prefix_hits"] = server.metric("vllm:prefix_cache_hits_total") - hits
        limits = self.args.limit_first / 1e3, self.args.limit_between / 1e3
        return row | summary(seen, (begin + WARM, begin + WARM + seconds), limits)

    def keep(self, part: str, row: dict[str, Any]) -> None:
        self.kept.rows.append({"part": part, **row})
        figures = {name: row.get(name, {}) for name in ("first_token_ms", "between_events_ms")}
        print(
            f"{part} {row.get('what', '')} {row['clients']} clients, {row['lengths']}: "
            f"{row['tokens_per_second']:,.0f} tokens/s, "
            f"{row['tokens_per_event']:.2f} tokens an event, first token p50/p99 "
            f"{figures['first_token_ms'].get('p50', 0):.2f}/"
            f"{figures['first_token_ms'].get('p99', 0):.2f} ms, between events "
            f"{figures['between_events_ms'].get('p50', 0):.2f}/"
            f"{figures['between_events_ms'].get('p99', 0):.2f} ms, errors {row['errors']}, "
            f"{row['prefix_hits']:.0f} prompt tokens from kept prefixes, "
            f"CPU {', '.join(f'{name} {share:.0%}' for name, share in row['cpu'].items())}",
            flush=True,
        )

    # -- parts -------------------------------------------------------------------------------------

    def ready(self) -> None:
        times = []
        with tempfile.TemporaryDirectory() as cache:  # empty at first
            for _ in range(2):
                with self.server(cache=Path(cache)) as server:
                    times.append(server.ready_seconds)
                    engine = json.loads(server.get("/ready"))["engine"]
        row = {"first_s": times[0], "warm_s": times[1], "engine": engine}
        self.kept.rows.append({"part": "ready", **row})
        print(f"ready after {times[0]:.2f} s, warm {times[1]:.2f} s; engine {engine}", flush=True)

    def closed(self) -> None:
        seconds = self.args.seconds
        with self.server("--event-tokens", "2", "--workers", str(self.args.workers)) as server:
            for clients in self.args.clients:
                for kind in KINDS:
                    self.keep("closed", self.loaded(server, clients, kind, seconds=seconds))

    def many(self) -> None:
        with self.server("--coalesce", "5", "--workers", "4") as server:
            for kind in KINDS:
                row = self.loaded(server, 256, kind, seconds=self.args.seconds)
                self.keep("many", row | {"workers": 4, "coalesce_ms": 5})

    def open(self) -> None:
        args = self.args
        with self.server("--event-tokens", "2", "--workers", str(args.workers)) as server:
            for rate in args.rates:
                row = self.loaded(server, 64, "random", seconds=args.seconds, rate=rate)
                self.keep("open", row | {"rate": rate, "what": f"{rate}/s"})

    def direct(self, runs: int) -> tuple[float, float]:
        """Milliseconds to the first token and to the end, through the engine without a server."""
        args = self.args
        settings = {"model": str(self.folder), "dtype": args.dtype, "device": args.device}
        job = {"settings": settings | {"slots": args.slots}, "runs": runs}
        job |= {
            "tokens": args.tokens,
            "prompts": text_prompts(self.tokenizer, [args.prompt] * (runs + 3)),
        }
        found = subprocess.run(
            [sys.executable, str(HERE / "server_direct.py")],
            input=json.dumps(job), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if found.returncode:
            raise Gpt2CupyError(f"the engine alone: {found.stderr.strip().splitlines()[-1]}")
        answer = json.loads(found.stdout.splitlines()[-1])
        record.add_loaded(answer["loaded"])
        first, last = np.median(answer["times"] or [(0, 0)], axis=0) * 1e3
        return float(first), float(last)

    def one(self) -> None:
        first, direct = self.direct(self.args.runs)
        with self.server("--event-tokens", "2") as server:
            row = self.loaded(server, 1, "equal", seconds=self.args.seconds)
            name = "vllm:time_to_first_token_seconds"
            inside = server.metric(f"{name}_sum") / server.metric(f"{name}_count") * 1e3
        row |= {"direct_ms": direct, "direct_first_token_ms": first}
        row |= {"over_direct": row["end_to_end_ms"]["p50"] / direct}
        # From the front's having the request to the engine process's having its first token.
        self.keep("one", row | {"engine_first_token_ms": inside})
        print(
            f"end to end over the engine directly: {row['over_direct']:.2f} x of {direct:.2f} ms "
            f"(first token: {first:.2f} ms directly, {inside:.2f} ms in the engine process)",
            flush=True,
        )

    def baseline(self) -> None:
        def measure(server: Server) -> None:
            for kind in KINDS:
                row = self.loaded(server, 32, kind, seconds=self.args.seconds)
                self.keep("baseline", row | {"what": "transformers"})

        self.with_peer(
            f"{PEERS}:transformers_generate", measure, "--workers", str(self.args.workers)
        )

    def norms(self) -> None:
        context = str(self.args.prompt + self.args.tokens)
        for what, engine in NORMS.items():

            def measure(server: Server, what: str = what) -> None:
                row = self.loaded(server, 32, "equal", seconds=self.args.row_seconds)
                about = json.loads(server.get("/ready"))["engine"]
                self.keep("norms", row | {"what": what, "engine": about})

            workers = str(self.args.workers)
            options = ("--event-tokens", "2", "--context", context, "--workers", workers)
            self.with_peer(engine, measure, *options)

    def with_peer(self, engine: str, measure: Callable[[Server], None], *options: str) -> None:
        """Measure a server with an engine of another script, if it starts here."""
        try:
            with self.server("--engine", engine, *options) as server:
                measure(server)
        except Gpt2CupyError as error:
            self.kept.skip(engine.rpartition(":")[2], str(error)[-300:].rstrip("."))


def run() -> None:
    options = parser(__doc__, "server.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--parts", type=names, default=list(PARTS))
    options.add_argument("--slots", type=int, default=256)
    options.add_argument("--workers", type=int, default=2, help="fronts where a part does not say")
    options.add_argument("--clients", type=numbers, default=[1, 8, 32, 128, 512])
    options.add_argument("--rates", type=numbers, default=[50, 100, 200, 300, 400])
    options.add_argument("--prompt", type=int, default=128)
    options.add_argument("--tokens", type=int, default=128)
    options.add_argument("--seconds", type=int, default=8)
    options.add_argument("--row-seconds", type=int, default=60)
    options.add_argument("--limit-first", type=int, default=50, help="ms, for the goodput")
    options.add_argument("--limit-between", type=int, default=5, help="ms, for the goodput")
    options.add_argument("--runs", type=int, default=20)
    options.add_argument("--processes", type=int, default=4, help="of clients")
    args = parsed(options)
    chosen(args.parts, PARTS, "part")
    chosen([args.dtype], DTYPES, "dtype")
    config = config_of(args.model)
    taken = ("model", "dtype", "slots", "workers", "prompt", "tokens", "seconds", "row_seconds")
    settings = {name: getattr(args, name) for name in taken}
    settings["limit_ms"] = {"first_token": args.limit_first, "between_events": args.limit_between}
    gpu = args.device != "cpu"
    with tempfile.TemporaryDirectory() as name, Kept(args.out, settings, gpu=gpu) as kept:
        write_served_checkpoint(Path(name), config, args.dtype)
        bench = Bench(args, Path(name), kept)
        parts: dict[str, Callable[[], None]] = {part: getattr(bench, part) for part in PARTS}
        for part in args.parts:
            parts[part]()
        if "one" not in args.parts:
            bench.direct(0)  # what a server loads, for the record


if __name__ == "__main__":
    main(run)
