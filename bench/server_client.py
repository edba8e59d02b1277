"""A process of clients for bench/server.py: plain sockets, one system call to wait for all.

Reads a job as JSON from stdin: ``port``; ``bodies`` (JSON texts of requests, taken in turn);
``clients``; ``seconds``; ``begin`` (when to start, by time.monotonic); ``rate`` (requests a second
of an open loop; 0 is a closed loop, in which each client sends again when it is answered); ``out``.
Writes arrays, as bench/serving.py's load() says.
"""

from __future__ import annotations

import json
import random
import re
import select
import socket
import sys
import time
from typing import Any

import numpy as np

_EVENT = b"data: {"
_END = b"\r\n0\r\n\r\n"
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')


class Client:
    """A connection and the request that is on it."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.busy = False

    def send(self, body: bytes, start: float) -> None:
        head = b"POST /v1/completions HTTP/1.1\r\nhost: bench\r\ncontent-length: %d\r\n\r\n"
        self.socket.sendall(head % len(body) + body)
        self.busy, self.start, self.first, self.tail = True, start, 0.0, b""
        self.times: list[float] = []

    def read(self, now: float) -> bool | None:
        """Whether the answer is complete; None if it is an error."""
        data = self.socket.recv(1 << 18)
        if not data or (not self.tail and not data.startswith(b"HTTP/1.1 200")):
            return None
        seen = self.tail[-(len(_EVENT) - 1) :] + data
        self.times += [now] * seen.count(_EVENT)
        self.tail = (self.tail + data)[-600:]
        return self.tail.endswith(_END)


class Load:
    """All clients of this process."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.bodies = [body.encode() for body in job["bodies"]]
        self.random = random.Random(job["seed"])
        self.place = job["seed"] * len(self.bodies) // 7  # where its turn begins
        self.epoll = select.epoll()
        self.clients: dict[int, Client] = {}
        self.rows: list[tuple[float, float, float, int, int]] = []
        self.times: list[list[float]] = []
        self.errors = 0

    def connect(self) -> Client:
        client = Client(self.job["port"])
        self.clients[client.socket.fileno()] = client
        self.epoll.register(client.socket, select.EPOLLIN)
        return client

    def drop(self, client: Client) -> None:
        self.epoll.unregister(client.socket)
        del self.clients[client.socket.fileno()]
        client.socket.close()
        self.errors += 1

    def ask(self, client: Client, start: float) -> None:
        self.place = (self.place + 1) % len(self.bodies)
        client.send(self.bodies[self.place], start)

    def run(self) -> None:
        rate, closed = self.job["rate"], not self.job["rate"]
        for _ in range(self.job["clients"]):
            self.connect()
        time.sleep(max(self.job["begin"] - time.monotonic(), 0))
        start = time.monotonic()
        stop = start + self.job["seconds"]
        due = start + (self.random.expovariate(rate) if rate else 0)
        if closed:
            for client in list(self.clients.values()):
                self.ask(client, time.monotonic())
        while True:
            now = time.monotonic()
            if now >= stop and not any(client.busy for client in self.clients.values()):
                return
            if now > stop + 60:
                self.errors += sum(client.busy for client in self.clients.values())
                return
            while not closed and due <= now < stop:
                free = next((c for c in self.clients.values() if not c.busy), None)
                self.ask(free or self.connect(), due)
                due += self.random.expovariate(rate)
            wait = 0.1 if closed or now >= stop else max(min(due - now, 0.1), 0)
            for number, _ in self.epoll.poll(wait):
                self.take(self.clients[number], closed and time.monotonic() < stop)

    def take(self, client: Client, again: bool) -> None:
        now = time.monotonic()
        done = client.read(now)
        if done is None:
            self.drop(client)
            if again:
                self.ask(self.connect(), now)
        elif done:
            count = _TOKENS.search(client.tail)
            times = client.times[:-1]  # the last event has the usage
            tokens = int(count[1]) if count else 0
            first = times[0] if times else now
            self.rows.append((client.start, first, now, len(times), tokens))
            self.times.append(times)
            client.busy = False
            if again:
                self.ask(client, now)


def main() -> None:
    job = json.load(sys.stdin)
    load = Load(job)
    load.run()
    rows = np.array(load.rows, np.float64).reshape(-1, 5)
    at = np.array([t for times in load.times for t in times])
    gaps = [np.diff(times, prepend=np.nan) for times in load.times if times]
    np.savez(
        job["out"],
        start=rows[:, 0],
        first=rows[:, 1],
        end=rows[:, 2],
        events=rows[:, 3].astype(np.int64),
        tokens=rows[:, 4],
        at=at,
        gap=np.concatenate(gaps) if gaps else np.zeros(0),
        errors=np.array([load.errors]),
    )


if __name__ == "__main__":
    main()
