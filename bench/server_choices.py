"""What the server could be made of, measured: HTTP servers, messages between processes, JSON.

    python bench/server_choices.py [--streams 32] [--seconds 3] [--out FILE]

HTTP: one process streams the same 512 events to each of --streams clients, again and again, by
uvicorn and, where they are installed, granian and FastAPI. Messages: the frame that an engine
process sends for a step of --rows streams, from one process to another. JSON: an event of a
stream. What the server uses is marked. Needs no GPU.
"""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zmq
from arguments import main, parsed, parser
from serving import load, summary
from shared import Kept

from gpt2cupy import record
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.server import messages
from gpt2cupy.server.messages import Tick

PEERS = Path(__file__).resolve().parent / "peers"
UVICORN = ["uvicorn", "--log-level", "error", "--no-access-log", "--no-server-header"]
GRANIAN = ["granian", "--interface", "asgi", "--no-ws", "--log-level", "error", "--workers", "1"]
FAST = ["--loop", "uvloop"]
APP = "events_asgi:app"
# What -> (its command, the application, whether the server uses it).
HTTP: dict[str, tuple[list[str], str, bool]] = {
    "uvicorn, httptools, uvloop": ([*UVICORN, *FAST, "--http", "httptools"], APP, True),
    "uvicorn, h11, asyncio": ([*UVICORN, "--loop", "asyncio", "--http", "h11"], APP, False),
    "granian, uvloop": ([*GRANIAN, *FAST], APP, False),
    "FastAPI, uvicorn, httptools, uvloop": (
        [*UVICORN, *FAST, "--http", "httptools", "--factory"], "events_asgi:fastapi", False,
    ),
}  # fmt: skip
LIBRARIES = (
    "uvicorn", "httptools", "uvloop", "h11", "granian", "fastapi", "pyzmq", "msgspec", "orjson",
)  # fmt: skip
FRAMES = 3000  # of a run of messages
CALLS = 20_000  # of a run of JSON


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def http(command: list[str], app: str, streams: int, seconds: float) -> dict[str, float]:
    """Events a second of a process that does nothing but send them, and its CPU."""
    port = free_port()
    whole = [sys.executable, "-m", *command, "--port", str(port), app]
    with subprocess.Popen(whole, cwd=PEERS, stderr=subprocess.PIPE, text=True) as process:
        try:
            _wait_for(port, process)
            begun = _cpu_seconds(process.pid)
            job = {"port": port, "bodies": ["{}"], "clients": streams, "seconds": seconds + 1}
            seen = load(job, 1)
            cpu = _cpu_seconds(process.pid) - begun
        finally:
            process.terminate()
    begin = float(seen["start"].min())
    found = summary(seen, (begin + 0.5, begin + 0.5 + seconds))
    if found["errors"] or not found["events_per_second"]:
        raise Gpt2CupyError(f"{command[0]} answered {found['errors']} requests with an error")
    return {"per_second": found["events_per_second"], "us": 1e6 * cpu / seen["events"].sum()}


def _wait_for(port: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            time.sleep(0.05)
    process.terminate()
    raise Gpt2CupyError(f"it did not start: {(process.communicate()[1] or '').strip()[-300:]}")


def _cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children, those that have ended too."""
    tick, total = os.sysconf("SC_CLK_TCK"), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if pid in (int(path.parent.name), int(fields[1])):
            total += sum(map(int, fields[11:15]))
    return total / tick


# -- messages --------------------------------------------------------------------------------------


def frame(rows: int) -> list[Any]:
    """What an engine process sends for a step of so many streams."""
    rng = np.random.default_rng(0)
    return [
        Tick(
            streams=np.arange(rows, dtype=np.int64).tobytes(),
            ids=rng.integers(0, 50257, rows, np.int32).tobytes(),
            logprobs=rng.standard_normal(rows, np.float32).tobytes(),
            finished=[],
        )
    ]


def _plain(rows: int) -> Any:
    """The same without arrays: a list for each stream."""
    rng = np.random.default_rng(0)
    pairs = zip(rng.integers(0, 50257, rows).tolist(), rng.standard_normal(rows), strict=True)
    return [[stream, token, float(logprob)] for stream, (token, logprob) in enumerate(pairs)]


def _send_zmq(address: str, encode: Callable[[Any], bytes], what: Any) -> None:
    own = zmq.Context().socket(zmq.PUSH)
    own.set(zmq.SNDHWM, 0)
    own.connect(address)
    for _ in range(FRAMES):
        own.send(encode(what))
    own.close(linger=10_000)


def _send_pipe(pipe: Any, encode: Callable[[Any], bytes], what: Any) -> None:
    for _ in range(FRAMES):
        pipe.send_bytes(encode(what))


def transport(kind: str, codec: str, rows: int) -> dict[str, float]:
    """Frames a second between two processes, and microseconds of the receiver for each."""
    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]
    if codec == "msgspec":
        encode, decode, what = messages.encode, messages.decode_to_front, frame(rows)
    else:
        what, decode = _plain(rows), json.loads
        encode = _json_bytes
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        if kind == "zmq":
            address = f"ipc://{folder}/frames"
            own = zmq.Context.instance().socket(zmq.PULL)
            own.set(zmq.RCVHWM, 0)
            own.bind(address)
            take, sender = own.recv, (_send_zmq, (address, encode, what))
        else:
            pipe, other = context.Pipe(duplex=False)
            take, sender = pipe.recv_bytes, (_send_pipe, (other, encode, what))
        process = context.Process(target=sender[0], args=sender[1])
        process.start()
        decode(take())
        start, busy = time.perf_counter(), time.process_time()
        for _ in range(FRAMES - 1):
            decode(take())
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        process.join()
        if kind == "zmq":
            own.close()
    return {"per_second": (FRAMES - 1) / seconds, "us": 1e6 * busy / (FRAMES - 1)}


def _json_bytes(what: Any) -> bytes:
    return json.dumps(what).encode()


# -- JSON ------------------------------------------------------------------------------------------


def spelling(encode: Callable[[Any], Any]) -> dict[str, float]:
    """Microseconds of an event."""
    choice = {"index": 0, "text": " wörd", "logprobs": None, "finish_reason": None}
    event = {"id": "cmpl-0", "object": "text_completion", "created": 1, "choices": [choice]}
    best = min(_seconds(lambda: encode(event)) for _ in range(7))
    return {"per_second": 1 / best, "us": 1e6 * best}


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    return (time.perf_counter() - start) / CALLS


def run() -> None:
    options = parser(__doc__, "server-choices.json", devices=("cpu",))
    options.set_defaults(device="cpu")
    options.add_argument("--streams", type=int, default=32)
    options.add_argument("--rows", type=int, default=64)
    options.add_argument("--seconds", type=int, default=3)
    args = parsed(options)
    settings: dict[str, Any] = {"streams": args.streams, "frame_rows": args.rows}
    settings |= {"seconds": args.seconds, "versions": record.versions(LIBRARIES)}
    with Kept(args.out, settings, gpu=False) as kept:

        def keep(part: str, what: str, used: bool, measure: Callable[[], dict[str, float]]) -> None:
            row = {"part": part, "what": what, "used": used} | measure()
            kept.rows.append(row)
            print(f"{part}: {what}: {row['per_second']:,.0f}/s, {row['us']:.2f} us", flush=True)

        for what, (command, app, used) in HTTP.items():
            if missing := [n for n in (command[0], app.rpartition(":")[2]) if not _is_here(n)]:
                kept.skip(what, f"{missing[0]} is not installed")
                continue
            measure = lambda c=command, a=app: http(c, a, args.streams, args.seconds)  # noqa: E731
            keep("HTTP", what, used, measure)
        for kind, codec, used in (
            ("zmq", "msgspec", True), ("pipe", "msgspec", False), ("zmq", "json", False),
        ):  # fmt: skip
            what = f"{'pyzmq over ipc' if kind == 'zmq' else 'a pipe of multiprocessing'}, {codec}"
            keep("frame", what, used, lambda k=kind, c=codec: transport(k, c, args.rows))
        for name, used in (("msgspec", True), ("json", False), ("orjson", False)):
            if not _is_here(name):
                kept.skip(name, "it is not installed")
                continue
            module = importlib.import_module("msgspec.json" if name == "msgspec" else name)
            encode = module.encode if name == "msgspec" else module.dumps
            keep("event", name, used, lambda e=encode: spelling(e))


def _is_here(name: str) -> bool:
    return name == "app" or importlib.util.find_spec(name) is not None


if __name__ == "__main__":
    main(run)
