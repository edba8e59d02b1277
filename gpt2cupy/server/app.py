"""The ASGI application: paths, keys, errors, and the life of a request."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import traceback
from collections.abc import Sequence
from typing import Any

import msgspec

from .._version import __version__
from ..errors import Gpt2CupyError, InputError, NoTokenizerError, kind_of, shown
from ..generation.completion_request import CompletionParser, CompletionRequest
from ..ids import check_tokens
from . import metrics
from .answers import Answer
from .chat import chat_request
from .description import description
from .front import Front
from .http import (
    CONNECTION,
    ApiError,
    ClientGone,
    Headers,
    Receive,
    Scope,
    Send,
    answer,
    header,
    read_body,
)

_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class App:
    """Answers HTTP requests of one front."""

    def __init__(self, front: Front) -> None:
        self.front = front
        self._parser = CompletionParser()
        # Path to method, whether a key is needed, and what answers.
        self._routes: dict[str, tuple[str, bool, Any]] = {
            "/health": ("GET", False, self._health),
            "/ready": ("GET", False, self._ready),
            "/version": ("GET", False, self._version),
            "/metrics": ("GET", False, self._metrics),
            "/openapi.json": ("GET", False, self._description),
            "/v1/models": ("GET", True, self._models),
            "/tokenize": ("POST", True, self._tokenize),
            "/detokenize": ("POST", True, self._detokenize),
            "/v1/completions": ("POST", True, self._completions),
            "/v1/chat/completions": ("POST", True, self._chat),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        arrived = time.monotonic()
        about: dict[str, Any] = {"id": secrets.token_hex(8)}
        scope["about"] = about
        own: Headers = [(b"x-request-id", about["id"].encode())]
        status = 200
        try:
            handler = self._route(scope)
            status = await handler(scope, receive, send, own, arrived)
        except Gpt2CupyError as error:
            status = await self._refuse(send, ApiError.of(error), own)
        except ApiError as error:
            status = await self._refuse(send, error, own)
        except ClientGone:
            status = 499
        except Exception as error:
            self.front.log.line("failed", error=traceback.format_exc(limit=-8), **about)
            status = 500
            what = f"this is a bug of the server: {type(error).__name__}"
            await self._refuse(send, ApiError(500, what), own)
        seconds = round(time.monotonic() - arrived, 4)
        path = scope["path"][:200]
        if path not in ("/health", "/ready", "/metrics") or status >= 500:
            self.front.log.request(status, path=path, **about, seconds=seconds)

    def _route(self, scope: Scope) -> Any:
        path, method = scope["path"], scope["method"]
        found = self._routes.get(path)
        if found is None and path == f"/v1/models/{self.front.settings.name}":
            found = "GET", True, self._model
        if found is None:
            raise ApiError(404, f"there is no {path[:200]!r} here")
        wanted, guarded, handler = found
        if method != wanted and not (method == "HEAD" and wanted == "GET"):
            allow = [(b"allow", wanted.encode())]
            raise ApiError(405, f"{path} takes {wanted}", headers=allow)
        if guarded and not self.front.allowed(header(scope, b"authorization")):
            raise ApiError(
                401, "no valid API key was given: send Authorization: Bearer KEY",
                code="invalid_api_key", headers=[(b"www-authenticate", b"Bearer")],
            )  # fmt: skip
        return handler

    async def _refuse(self, send: Send, error: ApiError, own: Headers) -> int:
        self.front.store.add("gpt2cupy:requests_refused")
        await answer(send, error.status, error.body, [*error.headers, *own])
        return error.status

    # -- what can be looked up ---------------------------------------------------------------------

    async def _json(self, send: Send, found: Any, own: Headers, status: int = 200) -> int:
        await answer(send, status, msgspec.json.encode(found), own)
        return status

    async def _health(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        return await self._json(send, {"status": "ok"}, own)

    async def _ready(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        ready = self.front.link.about is not None and not self.front.draining
        found = {"ready": ready, "engine": self.front.link.about}
        return await self._json(send, found, own, 200 if ready else 503)

    async def _version(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        return await self._json(send, {"version": __version__}, own)

    async def _description(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        front = self.front
        return await self._json(send, description(front.settings.name, front.context), own)

    async def _metrics(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        settings = self.front.settings
        text = metrics.exposition(metrics.total(settings.folder), settings.name)
        kind = b"text/plain; version=0.0.4; charset=utf-8"
        await answer(send, 200, text.encode(), own, kind)
        return 200

    def _about_model(self) -> dict[str, Any]:
        front = self.front
        return {
            "id": front.settings.name,
            "object": "model",
            "created": front.created,
            "owned_by": "gpt2cupy",
            "root": front.settings.model,
            "max_model_len": front.context,
        }

    async def _models(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        return await self._json(send, {"object": "list", "data": [self._about_model()]}, own)

    async def _model(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        return await self._json(send, self._about_model(), own)

    # -- text and ids ------------------------------------------------------------------------------

    async def _tokenize(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        body = await self._coded(scope, receive, own, "prompt", "return_token_strs")
        prompt, with_texts = body.get("prompt"), body.get("return_token_strs")
        if not isinstance(prompt, str):
            raise _impossible("prompt", prompt, "a string: the text to tokenize")
        if not isinstance(with_texts, bool | None):
            raise _impossible("return_token_strs", with_texts, "true or false")
        loop = asyncio.get_running_loop()
        ids = await loop.run_in_executor(None, self.front.tokenizer.encode, prompt)
        found = {"count": len(ids), "max_model_len": self.front.context, "tokens": ids}
        if with_texts:
            found["token_strs"] = [self.front.names[id_] for id_ in ids]
        return await self._json(send, found, own)

    async def _detokenize(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, _: float
    ) -> int:
        body = await self._coded(scope, receive, own, "tokens")
        tokens = body.get("tokens")
        if not isinstance(tokens, list):
            raise _impossible("tokens", tokens, "a list of token ids")
        try:
            ids = check_tokens(tokens, self.front.config).tolist() if tokens else []
            text = self.front.tokenizer.decode(ids)
        except (InputError, NoTokenizerError) as error:
            named = InputError(error.what, where="tokens", remedy=error.remedy)
            raise ApiError.of(named, "tokens") from error
        return await self._json(send, {"prompt": text}, own)

    async def _coded(
        self, scope: Scope, receive: Receive, own: Headers, *fields: str
    ) -> dict[str, Any]:
        """The object that asks for ids or text; what it has beside these fields is named."""
        _, body = await self._body(scope, receive)
        if not isinstance(body, dict):
            raise ApiError(400, f"the body is {kind_of(body)}, not an object")
        self.front.check_model(body.get("model"))
        _name_ignored(own, sorted(body.keys() - {"model", *fields}))
        return body

    async def _body(self, scope: Scope, receive: Receive) -> tuple[int, Any]:
        """Size and meaning of a body."""
        data = await read_body(scope, receive, self.front.settings.max_body)
        try:
            return len(data), msgspec.json.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from error

    # -- completions -------------------------------------------------------------------------------

    async def _completions(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, arrived: float
    ) -> int:
        size, body = await self._body(scope, receive)
        return await self._run(
            self._parser.parse(body), scope, receive, send, own, arrived, chat=False, size=size
        )

    async def _chat(
        self, scope: Scope, receive: Receive, send: Send, own: Headers, arrived: float
    ) -> int:
        size, body = await self._body(scope, receive)
        asked = chat_request(body, self.front.template)
        return await self._run(asked, scope, receive, send, own, arrived, chat=True, size=size)

    async def _run(
        self,
        asked: CompletionRequest,
        scope: Scope,
        receive: Receive,
        send: Send,
        own: Headers,
        arrived: float,
        *,
        chat: bool,
        size: int,
    ) -> int:
        """Answer a request to continue texts; counted once, however it ends."""
        front = self.front
        _name_ignored(own, asked.ignored)
        made = await front.accept(asked, arrived, chat=chat, size=size)
        outcome = "error"
        loop = asyncio.get_running_loop()
        gone = loop.create_task(_wait_until_gone(receive, made))
        seconds = front.settings.request_seconds
        limit = loop.call_later(seconds, made.fail, 504, f"not done after {seconds:g} s", "timeout")
        try:
            status = await (_stream if asked.stream else _whole)(made, scope, send, own)
            if made.error is None:
                outcome = "completed"
            elif made.error.status == 499:
                outcome = "client_gone"
            return status
        finally:
            limit.cancel()
            gone.cancel()
            made.close()
            front.answered(made, outcome)
            usage = made.usage()
            scope["about"].update(
                outcome=outcome,
                stream=asked.stream,
                prompt_tokens=usage["prompt_tokens"],
                completion_tokens=usage["completion_tokens"],
            )
            if front.log.prompts:
                scope["about"]["prompts"] = asked.prompts


def _name_ignored(own: Headers, fields: Sequence[str]) -> None:
    """Add the header that names the fields of a body that mean nothing here."""
    if fields:
        names = ", ".join(_UNSAFE.sub("?", name[:40]) for name in fields[:20])
        own.append((b"x-ignored-fields", names.encode()))


def _impossible(field: str, value: Any, allowed: str) -> ApiError:
    what = f"{field} is missing" if value is None else f"{field}={shown(value)} is impossible"
    return ApiError(400, f"{what}. It must be {allowed}.", param=field)


async def _wait_until_gone(receive: Receive, made: Answer) -> None:
    """End an answer whose client went away."""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            made.fail(499, "the client went away")
            return


async def _whole(made: Answer, scope: Scope, send: Send, own: Headers) -> int:
    while not made.ended:
        await made.wait()
    if made.error is not None:
        await answer(send, made.error.status, made.error.body, [*made.error.headers, *own])
        return made.error.status
    await answer(send, 200, msgspec.json.encode(made.whole()), own)
    return 200


async def _stream(made: Answer, scope: Scope, send: Send, own: Headers) -> int:
    await made.wait()
    if made.error is not None and not made.events:  # nothing was sent: the status can say so
        await answer(send, made.error.status, made.error.body, [*made.error.headers, *own])
        return made.error.status
    await send({"type": "http.response.start", "status": 200, "headers": [*_STREAM, *own]})
    connection = scope.get("extensions", {}).get(CONNECTION)
    while True:
        more = not made.ended
        made.connection = None  # what comes while this waits for the client comes after it
        body = made.take_parts()
        await send({"type": "http.response.body", "body": body, "more_body": more})
        if not more:
            return 200
        if connection is not None and connection.writes_chunks:
            made.connection = connection
        await made.wait()
