"""Between HTTP and the application: connections that cannot be held for ever, bodies, answers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ..errors import Gpt2CupyError
from ..generation.completion_request import error_object, status_of

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]
# The code of an error that has none of its own.
CODES = {
    400: "invalid_request",
    404: "not_found",
    405: "method_not_allowed",
    408: "timeout",
    413: "body_too_large",
    429: "queue_full",
    499: "client_gone",
    503: "unavailable",
    504: "timeout",
}

CONNECTION = "gpt2cupy.connection"  # the extension of a scope that has it
_TRICKLE = 1024  # bytes a second that a client must read while the server waits for it
_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: application/json\r\n"
    b"content-length: %d\r\n\r\n%b"
)


class Connection(HttpToolsProtocol):
    """A connection of uvicorn that :meth:`look_after` ends where its client holds it up."""

    waiting_since: float | None = None  # since when a request is to come whole
    blocked: tuple[float, int] | None = None  # since when so many bytes are to be read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.waiting_since = self.loop.time()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: self}  # type: ignore[dict-item]
        self.waiting_since = self.loop.time()

    @property
    def writes_chunks(self) -> bool:
        """Whether the answer that has begun is sent in chunks."""
        return bool(self.cycle.chunked_encoding) and not self.cycle.disconnected

    def write_chunk(self, data: bytes) -> bool:
        """Send a part of the answer that has begun, past ASGI; False where that has to wait."""
        if self.flow.write_paused:
            return False
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        return True

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self.waiting_since = None

    def look_after(self, now: float, receive_seconds: float, reader_seconds: float) -> bool:
        """Close what is held up; returns whether it was because nobody reads.

        A request has to arrive within ``receive_seconds``. While more is written than the
        connection takes at once, its client has to read a kilobyte a second.
        """
        transport = self.transport
        if self.waiting_since is not None and now - self.waiting_since > receive_seconds:
            self.waiting_since = None
            if not transport.is_closing():
                started = self.cycle is not None and self.cycle.response_started
                if not started:
                    body = encoded_error(408, "the request did not arrive in time")
                    transport.write(_LATE % (len(body), body))
                transport.close()
        left = transport.get_write_buffer_size()
        done = self.cycle is None or self.cycle.response_complete
        if not left or not (self.flow.write_paused or done or transport.is_closing()):
            self.blocked = None
        elif self.blocked is None:
            self.blocked = now, left
        elif now - self.blocked[0] > reader_seconds:
            if self.blocked[1] - left < _TRICKLE * reader_seconds:
                transport.abort()
                return True
            self.blocked = now, left
        return False


class ApiError(Exception):
    """An answer that is an error, in OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Headers = [],  # noqa: B006 - never changed
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers
        self.body = encoded_error(status, message, param=param, code=code)

    @classmethod
    def of(cls, error: Gpt2CupyError, ids: str = "prompt") -> ApiError:
        """An error of ours; ``ids`` is the field that token ids came in."""
        found = error_object(error)
        param = ids if error.where in ("ids", ids) else found["param"]
        return cls(status_of(error), found["message"], param=param, code=found["code"])


def error_in_form(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The object of an error; ``code`` is a word wherever it comes from, as OpenAI has it."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    code = code or CODES.get(status, kind)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def encoded_error(
    status: int, message: str, *, param: str | None = None, code: str | None = None
) -> bytes:
    return msgspec.json.encode(error_in_form(status, message, param=param, code=code))


def header(scope: Scope, name: bytes) -> bytes:
    """A header of the request; nothing where it has none."""
    return next((value for key, value in scope["headers"] if key == name), b"")


class ClientGone(Exception):
    """The client went away before its request was there."""


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The body of a request.

    Raises
    ------
    ClientGone
    ApiError
        If it is larger than ``most`` bytes; the connection ends with the answer.
    """
    too_large = ApiError(
        413, f"the body is larger than {most} bytes", headers=[(b"connection", b"close")]
    )
    declared = header(scope, b"content-length")
    if declared.isdigit() and int(declared) > most:
        raise too_large
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message["body"])
        size += len(message["body"])
        if size > most:
            raise too_large
        if not message["more_body"]:
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def answer(
    send: Send, status: int, body: bytes, headers: Headers, kind: bytes = b"application/json"
) -> None:
    """Send a whole answer."""
    length = str(len(body)).encode()
    all_headers = [(b"content-type", kind), (b"content-length", length), *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})
