"""A front process: ``python -m gpt2cupy.server.front_process NUMBER SETTINGS``.

Lines of JSON on stdin say where the engine process is and when to stop; the end of stdin means
that whoever started this process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import socket
import sys
from collections.abc import Iterator
from typing import Any

import uvicorn
import uvloop

from ..errors import Gpt2CupyError
from .app import App
from .engine_process import tell, tell_failure
from .front import Front
from .http import Connection
from .settings import Settings

_CANNOT_START = 2
_LOOK_SECONDS = 0.5


class _Server(uvicorn.Server):
    """uvicorn, whose signals are the business of the process that started this one."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    number, settings = int(sys.argv[1]), Settings.from_json(sys.argv[2])
    try:
        front = Front(number, settings)
    except Gpt2CupyError as error:
        tell_failure(error)
        sys.exit(_CANNOT_START)
    gc.collect()
    gc.freeze()
    uvloop.run(serve(front))


async def serve(front: Front) -> None:
    """Until told to stop, and all that was accepted is answered."""
    settings = front.settings
    front.connect(lambda: tell("ready"))
    config = uvicorn.Config(
        App(front),
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=max(int(settings.receive_seconds), 1),
        timeout_graceful_shutdown=None,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    listener = loop.create_task(_obey(front, server, reader))
    keeper = loop.create_task(_look_after(front, server))
    running = loop.create_task(server.serve(sockets=[_listening(settings)]))
    while not server.started:
        await asyncio.sleep(0.005)
    tell("listening")
    await running
    listener.cancel()
    keeper.cancel()
    front.log.flush()


def _listening(settings: Settings) -> socket.socket:
    """A socket of this front; the kernel deals connections out among those of all fronts."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.bind((settings.host, settings.port))
    made.setblocking(False)
    return made


async def _obey(front: Front, server: uvicorn.Server, reader: asyncio.StreamReader) -> None:
    """Do what the lines on stdin say."""
    while line := await reader.readline():
        told: dict[str, Any] = json.loads(line)
        if "engine" in told:
            if told["engine"] is None:
                front.link.lost()
            else:
                front.link.connect(told["engine"])
        if told.get("stop") and not front.draining:
            front.draining = True
            server.should_exit = True
            loop = asyncio.get_running_loop()
            loop.call_later(front.settings.drain_seconds, _give_up, front, server)
    server.force_exit = server.should_exit = True
    front.link.lost()


def _give_up(front: Front, server: uvicorn.Server) -> None:
    """Answer what is left with an error."""
    for answer in list(front.active):
        answer.fail(503, "the server is being stopped", "stopping")
    asyncio.get_running_loop().call_later(1, setattr, server, "force_exit", True)


async def _look_after(front: Front, server: uvicorn.Server) -> None:
    """Close connections that their clients hold up."""
    settings, loop = front.settings, asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_LOOK_SECONDS)
        now = loop.time()
        for connection in list(server.server_state.connections):
            if isinstance(connection, Connection) and connection.look_after(
                now, settings.receive_seconds, settings.slow_reader_seconds
            ):
                front.store.add("gpt2cupy:slow_readers_closed")


if __name__ == "__main__":
    main()
