"""The process that ``gpt2cupy serve`` is: it starts the others, watches them and ends them."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import msgspec

from ..errors import Gpt2CupyError, InputError
from .log import Log
from .metrics import Store
from .settings import Settings

_BACKOFF = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)  # seconds before an engine is started again
_STEADY = 60.0  # an engine that lived so long begins anew with these


class _Child:
    """A process that was started, and the lines that it writes."""

    def __init__(self, kind: str, number: int, settings: Settings) -> None:
        self.kind, self.number = kind, number
        self.since = time.monotonic()
        self.started = False  # of a front: that it listens
        self.ready = False
        self.failure: Gpt2CupyError | None = None  # why it could not start
        self._rest = b""
        module = f"gpt2cupy.server.{kind}_process"
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(number), settings.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def tell(self, **told: Any) -> None:
        """A line for its stdin."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it may have just ended
            self.process.stdin.write(json.dumps(told).encode() + b"\n")
            self.process.stdin.flush()

    def lines(self) -> list[dict[str, Any]] | None:
        """What it has written; None when it has ended."""
        assert self.process.stdout is not None
        data = os.read(self.process.stdout.fileno(), 1 << 16)
        if not data:
            return None
        *whole, self._rest = (self._rest + data).split(b"\n")
        found = []
        for line in whole:
            with contextlib.suppress(ValueError):
                told = json.loads(line)
                if isinstance(told, dict):
                    found.append(told)
        return found

    def end(self) -> None:
        """Close its stdin, which tells it to end."""
        with contextlib.suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.close()


class Supervisor:
    """Runs a server until a signal ends it.

    Parameters
    ----------
    settings : Settings
        ``folder`` is made here, and ``port`` 0 becomes one that is free.
    """

    def __init__(self, settings: Settings) -> None:
        self._log = Log(settings)
        self._start = time.monotonic()
        self._folder = tempfile.mkdtemp(prefix="gpt2cupy-")  # of mode 0700
        self._port = _reserved(settings)
        port = self._port.getsockname()[1]
        self.settings = msgspec.structs.replace(settings, folder=self._folder, port=port)
        self._store = Store(self._folder, "supervisor")
        self._engine_store = Store(self._folder, "engine")
        self._selector = selectors.DefaultSelector()
        self._engine: _Child | None = None
        self._fronts: dict[int, _Child] = {}
        self._generation = 0
        self._failures = 0
        self._again: float | None = None  # when to start an engine
        self._ever_ready = False
        self._stopping = False
        self._signals = 0

    def _say(self, line: str) -> None:
        """A line for whoever started the server."""
        self._log.text(f"gpt2cupy: {line}")

    @property
    def url(self) -> str:
        host = self.settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    def run(self) -> None:
        """Until SIGTERM, SIGINT, or SIGHUP of a terminal that closed; the second ends at once.

        Raises
        ------
        Gpt2CupyError
            If the server cannot start.
        """
        try:
            with self._signals_taken():
                self._start_engine()
                for number in range(self.settings.workers):
                    self._start_front(number)
                while self._engine or self._fronts or self._again:
                    self._turn()
        finally:
            self._kill()
            self._port.close()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._log.flush()

    # -- starting ----------------------------------------------------------------------------------

    def _start_engine(self) -> None:
        self._again = None
        self._generation += 1
        self._engine = self._watched(_Child("engine", self._generation, self.settings))
        for front in self._fronts.values():
            front.tell(engine=self.settings.engine_address(self._generation))

    def _start_front(self, number: int) -> None:
        front = self._fronts[number] = self._watched(_Child("front", number, self.settings))
        if self._engine is not None:
            front.tell(engine=self.settings.engine_address(self._generation))

    def _watched(self, child: _Child) -> _Child:
        assert child.process.stdout is not None
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)
        return child

    # -- watching ----------------------------------------------------------------------------------

    def _turn(self) -> None:
        wait = None if self._again is None else max(self._again - time.monotonic(), 0)
        for key, _ in self._selector.select(wait):
            if key.data is None:
                os.read(key.fd, 4096)
                self._on_signal()
                continue
            lines = key.data.lines()
            if lines is None:
                self._selector.unregister(key.fileobj)
                self._on_end(key.data)
                continue
            for told in lines:
                self._on_line(key.data, told)
        if self._again is not None and time.monotonic() >= self._again:
            self._start_engine()

    def _on_line(self, child: _Child, told: dict[str, Any]) -> None:
        if told["event"] == "failed":
            kind = InputError if told["of_caller"] else Gpt2CupyError
            child.failure = kind(told["what"], where=told["where"], remedy=told["remedy"])
        elif told["event"] == "note":
            self._say(told["message"])
        elif told["event"] == "listening":
            child.started = True
        else:
            child.ready = True
            if not self._ever_ready and self._all_ready():
                self._ever_ready = True
                seconds = time.monotonic() - self._start
                self._say(f"{self.settings.name} is ready on {self.url} after {seconds:.1f} s")
            elif child.kind == "engine" and self._ever_ready and self._generation > 1:
                self._say("the engine process is ready again")

    def _all_ready(self) -> bool:
        children = [self._engine, *self._fronts.values()]
        return all(child is not None and child.ready for child in children)

    def _on_end(self, child: _Child) -> None:
        code = child.process.wait()
        if child is self._engine:
            self._engine = None
            self._engine_ended(child, code)
        elif self._fronts.get(child.number) is child:
            del self._fronts[child.number]
            self._front_ended(child, code)

    @staticmethod
    def _ended(child: _Child, what: str) -> Gpt2CupyError:
        """The error of a process that did not come up."""
        if child.failure:
            return child.failure
        more = "What it wrote to stderr before may say more."
        return Gpt2CupyError(what, where="serve", remedy=more)

    def _engine_ended(self, child: _Child, code: int) -> None:
        for name in ("vllm:num_requests_running", "vllm:num_requests_waiting"):
            self._engine_store.set(name, 0)
        self._engine_store.set("vllm:kv_cache_usage_perc", 0)
        self._engine_store.set("gpt2cupy:engine_up", 0)
        for front in self._fronts.values():
            front.tell(engine=None)
        if self._stopping:
            return
        if not self._ever_ready:
            raise self._ended(child, f"the engine process ended before it was ready, code {code}")
        if time.monotonic() - child.since > _STEADY:
            self._failures = 0
        wait = _BACKOFF[min(self._failures, len(_BACKOFF) - 1)]
        self._failures += 1
        self._store.add("gpt2cupy:engine_restarts")
        why = f": {child.failure}" if child.failure else ""
        self._say(f"the engine process ended ({code}{why}); it is started again")
        self._again = time.monotonic() + wait

    def _front_ended(self, child: _Child, code: int) -> None:
        if self._stopping:
            if not self._fronts and self._engine is not None:
                self._engine.end()
            return
        if not (child.started or self._ever_ready):
            raise self._ended(child, f"a front process ended at its start, code {code}")
        self._store.add("gpt2cupy:front_restarts")
        self._say(f"front {child.number} ended ({code}); it is started again")
        self._start_front(child.number)

    # -- ending ------------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        self._signals += 1
        if self._signals > 1:
            self._say("ended at once")
            self._kill()
            self._engine, self._fronts, self._again = None, {}, None
            return
        self._say("no new requests; those that were accepted are answered")
        self._stopping = True
        self._again = None
        for front in self._fronts.values():
            front.tell(stop=True)
        if not self._fronts and self._engine is not None:
            self._engine.end()

    def _kill(self) -> None:
        children = [child for child in (self._engine, *self._fronts.values()) if child]
        for child in children:
            child.process.kill()
        for child in children:
            child.process.wait()

    @contextlib.contextmanager
    def _signals_taken(self) -> Iterator[None]:
        """Signals as bytes that the selector sees, so that none comes in the middle of anything."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        self._selector.register(ours, selectors.EVENT_READ, None)
        wakeup = signal.set_wakeup_fd(theirs.fileno())
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN  # as nohup has it
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._selector.unregister(ours)
            ours.close()
            theirs.close()


def _reserved(settings: Settings) -> socket.socket:
    """The port, bound and not listened on: fronts share it, and no other server has it.

    Raises
    ------
    Gpt2CupyError
        If it is taken, or the host is none of this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        # Without SO_REUSEPORT this fails where another server of ours listens.
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((settings.host, settings.port))
            port = probe.getsockname()[1]
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        made.bind((settings.host, port))
    except (OSError, OverflowError) as error:
        raise Gpt2CupyError(  # not InputError: the option may be right, and the machine is not
            f"{settings.host}:{settings.port} cannot be used: {error}",
            where="--host, --port",
            remedy="Stop what listens there, or take another port or host.",
        ) from error
    return made
