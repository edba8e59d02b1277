"""Server-sent events of the two endpoints, their unchanging bytes made once for each choice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..generation.completion_response import FINISH_REASONS, TokenNames, logprobs_object
from ..generation.text import Completion

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.encode


class CompletionForm:
    """Events and whole answers of ``/v1/completions``.

    Parameters
    ----------
    id_ : str
    created : int
        Seconds since 1970.
    model : str
    """

    object = "text_completion"
    chunk_object = "text_completion"
    opening = b',"text":"'
    closing = b'"'

    def __init__(self, id_: str, created: int, model: str) -> None:
        self.id = id_
        self.created = created
        self.model = model
        self._head = b'data: {"id":%b,"object":%b,"created":%d,"model":%b' % (
            _encode(id_),
            _encode(self.chunk_object),
            created,
            _encode(model),
        )

    def around(self, index: int, *, usage: bool) -> tuple[bytes, bytes]:
        """What stands before and after the text of an event in the middle of a choice."""
        before = b'%b,"choices":[{"index":%d%b' % (self._head, index, self.opening)
        after = b'%b,"logprobs":null,"finish_reason":null}]%b}\n\n'
        return before, after % (self.closing, b',"usage":null' if usage else b"")

    def event(
        self,
        index: int,
        text: bytes,
        *,
        logprobs: Any = None,
        reason: str | None = None,
        usage: Any = None,
        with_usage: bool = False,
    ) -> bytes:
        """An event of any kind; ``text`` is part of a JSON string."""
        return b'%b,"choices":[{"index":%d%b%b%b,"logprobs":%b,"finish_reason":%b}]%b}\n\n' % (
            self._head,
            index,
            self.opening,
            text,
            self.closing,
            _encode(logprobs),
            _encode(reason and FINISH_REASONS[reason]),
            b',"usage":%b' % _encode(usage) if with_usage or usage else b"",
        )

    def usage_event(self, usage: dict[str, int]) -> bytes:
        """The event after all choices."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, _encode(usage))

    def first(self, index: int) -> bytes:
        """What goes before the events of a choice."""
        return b""

    def logprobs(
        self,
        names: TokenNames,
        ids: Sequence[int],
        values: Sequence[float | None],
        top: Sequence[Any],
        start: int,
    ) -> Any:
        """The field ``logprobs`` of a piece."""
        return logprobs_object(names, ids, values, top, start)

    def whole(self, found: dict[str, Any], completions: Sequence[Completion]) -> dict[str, Any]:
        """The answer, from what :func:`completion_response` gives."""
        return found


class ChatForm(CompletionForm):
    """Events and whole answers of ``/v1/chat/completions``."""

    object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    opening = b',"delta":{"content":"'
    closing = b'"}'

    def __init__(self, id_: str, created: int, model: str, names: TokenNames) -> None:
        super().__init__(id_, created, model)
        self._names = names

    def first(self, index: int) -> bytes:
        delta = b'{"role":"assistant","content":""}'
        choice = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null}' % (index, delta)
        return b'%b,"choices":[%b]}\n\n' % (self._head, choice)

    def logprobs(
        self,
        names: TokenNames,
        ids: Sequence[int],
        values: Sequence[float | None],
        top: Sequence[Any],
        start: int,
    ) -> Any:
        rows = zip(ids, values, top, strict=True)
        return {
            "content": [
                {**self._token(id_, value), "top_logprobs": [self._token(*pair) for pair in best]}
                for id_, value, best in rows
            ]
        }

    def _token(self, id_: int, value: float | None) -> dict[str, Any]:
        name = self._names[id_]
        try:
            data = list(self._names.tokenizer.decode_bytes([id_]))
        except Exception:  # an id without text
            data = None
        return {"token": name, "logprob": value, "bytes": data}

    def whole(self, found: dict[str, Any], completions: Sequence[Completion]) -> dict[str, Any]:
        for choice, done in zip(found["choices"], completions, strict=True):
            if choice["logprobs"] is not None:
                part = slice(0, len(choice["logprobs"]["tokens"]))
                values = done.tokens[part], done.logprobs[part], done.top[part]
                choice["logprobs"] = self.logprobs(self._names, *values, 0)
            choice["message"] = {"role": "assistant", "content": choice.pop("text")}
        return {**found, "object": self.object}


def error_event(error: dict[str, Any]) -> bytes:
    """An error in place of what would have followed."""
    return b"data: %b\n\n" % _encode(error)
