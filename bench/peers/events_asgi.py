"""ASGI applications that stream the same events to whoever asks: for bench/server_choices.py."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

EVENTS = 512  # of an answer
EVENT = (
    b'data: {"id":"cmpl-0","object":"text_completion","created":1,"model":"gpt2","choices":'
    b'[{"index":0,"text":" word","logprobs":null,"finish_reason":null}]}\n\n'
)
LAST = b'data: {"choices":[],"usage":{"prompt_tokens":1,"completion_tokens":%d}}\n\n' % EVENTS
KIND = "text/event-stream"


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The interface itself, as the server's own application uses it."""
    if scope["type"] != "http":
        return
    while (await receive()).get("more_body"):
        pass
    headers = [(b"content-type", KIND.encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for _ in range(EVENTS):
        await send({"type": "http.response.body", "body": EVENT, "more_body": True})
        await asyncio.sleep(0)  # streams take turns, as they do where each waits for a token
    await send({"type": "http.response.body", "body": LAST, "more_body": False})


def fastapi() -> Any:
    """The same by FastAPI and its StreamingResponse."""
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    made = FastAPI()

    async def events() -> AsyncIterator[bytes]:
        for _ in range(EVENTS):
            yield EVENT
            await asyncio.sleep(0)
        yield LAST

    async def completions(request: Request) -> StreamingResponse:
        await request.body()
        return StreamingResponse(events(), media_type=KIND)

    completions.__annotations__ |= {"request": Request}  # written as text in this file
    made.post("/v1/completions", response_model=None)(completions)
    return made
