"""A real server for tests: its processes, plain sockets, and counts that must agree."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpt2cupy.record import ROOT

ENGINES = ROOT / "tests" / "support" / "served_engines.py"


class Served:
    """``gpt2cupy serve`` on a free port; a context manager that ends it."""

    def __init__(
        self, *options: str, environment: dict[str, str] | None = None, log: int | None = None
    ) -> None:
        self.options = options
        self._log = log
        self.environment = environment or {}

    def __enter__(self) -> Served:
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"}
        if extra := self.environment.pop("PYTHONPATH", ""):
            environment["PYTHONPATH"] = os.pathsep.join([extra, path])
        self.stderr = tempfile.NamedTemporaryFile(suffix=".log")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt2cupy", "serve", "--port", "0", "--device", "cpu",
             *self.options],
            stderr=self._log or self.stderr, env=environment | self.environment,
        )  # fmt: skip
        self.port = 0
        try:
            if self._log is None:
                eventually(self._is_ready, 30)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.process.wait()
            self.stderr.close()

    def log(self) -> str:
        """What has come on stderr so far."""
        return Path(self.stderr.name).read_text()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.log()
        self.take_port(self.log())
        return self.port > 0

    def take_port(self, log: str) -> None:
        """Where it listens, once the log says that it does."""
        for line in log.splitlines():
            if " is ready on http://" in line:
                self.port = int(line.partition("http://")[2].split()[0].rpartition(":")[2])

    # -- requests ----------------------------------------------------------------------------------

    def ask(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            connection.request(method, path, data, headers or {})
            reply = connection.getresponse()
            return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        return json.loads(self.ask("GET", path)[2])

    def complete(self, **body: Any) -> Any:
        """The object that answers a completion request."""
        status, _, data = self.ask("POST", "/v1/completions", body)
        assert status == 200, data
        return json.loads(data)

    def events(self, **body: Any) -> list[Any]:
        """The events of a streamed completion, but for the last, which must be [DONE]."""
        status, headers, data = self.ask("POST", "/v1/completions", {**body, "stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        return events_of(data)

    def connect(self, body: Any = None, *, buffer: int = 0) -> socket.socket:
        """A connection, on which a completion request was sent where there is a body."""
        made = socket.socket()
        if buffer:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        made.settimeout(30)
        try:
            made.connect(("127.0.0.1", self.port))
            if body is not None:
                made.sendall(request(body))
        except OSError:
            made.close()
            raise
        return made

    # -- what it says of itself --------------------------------------------------------------------

    def metric(self, name: str, label: str = "") -> float:
        """A metric, summed over the label values that contain ``label``."""
        lines = self.ask("GET", "/metrics")[2].decode().splitlines()
        found = [line for line in lines if line.startswith(name + "{") and label in line]
        assert found, name
        return sum(float(line.rpartition(" ")[2]) for line in found)

    def counts(self) -> dict[str, float]:
        """Requests accepted and what became of them."""
        outcomes = ("completed", "error", "client_gone")
        found = {
            name: self.metric("gpt2cupy:requests_answered_total", f'outcome="{name}"')
            for name in outcomes
        }
        return found | {"accepted": self.metric("gpt2cupy:requests_accepted_total")}

    def check_all_answered(self) -> dict[str, float]:
        """Wait until nothing runs and every accepted request has one outcome."""

        def settled() -> bool:
            found = self.counts()
            busy = self.metric("vllm:num_requests_running")
            busy += self.metric("vllm:num_requests_waiting")
            return not busy and found["accepted"] == sum(found.values()) - found["accepted"]

        eventually(settled, 10)
        return self.counts()

    def processes(self, kind: str) -> list[int]:
        """Ids of the processes of a kind, "engine" or "front", in the order of their start."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                stat = (path / "stat").read_text()
                words = (path / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            parent = int(stat.rpartition(")")[2].split()[1])
            if parent == self.process.pid and f"gpt2cupy.server.{kind}_process".encode() in words:
                found.append(int(path.name))
        return sorted(found)


def request(body: Any, path: str = "/v1/completions") -> bytes:
    """The bytes of a request."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-length: {len(data)}\r\n\r\n"
    return head.encode() + data


def events_of(data: bytes) -> list[Any]:
    """Server-sent events, but for the last, which must be [DONE]."""
    *parts, done, rest = data.split(b"\n\n")
    assert done == b"data: [DONE]" and not rest, data[-200:]
    assert all(part.startswith(b"data: ") for part in parts), parts
    return [json.loads(part[6:]) for part in parts]


def text_of(events: list[Any], index: int = 0) -> str:
    """The text that events give to a choice."""
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)


def eventually(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """The condition's value once it is true; fails if it does not come to that.

    A connection that is reset, as by a front process that was killed, is another try.
    """
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(ConnectionError):
            if found := condition():
                return found
        assert time.monotonic() < end, f"not within {seconds} s: {condition}"
        time.sleep(0.02)


def read_answer(connection: socket.socket) -> bytes:
    """One answer that says how long it is, head and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1 << 16)
    head = data.partition(b"\r\n\r\n")[0]
    size = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(data) < len(head) + 4 + size:
        data += connection.recv(1 << 16)
    return data


def read_all(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            parts.append(data)
    return b"".join(parts)


@contextlib.contextmanager
def closing_all(connections: list[socket.socket]) -> Iterator[list[socket.socket]]:
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()
