"""Choices of an answer: text that grows token by token, streamed or kept until its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..generation.completion_response import usage_object
from ..generation.request import Request
from ..generation.text import Completion, GrowingText, text_of
from .token_text import JsonText, in_json

if TYPE_CHECKING:
    from .answers import Answer

_NON_FINITE = "the model's logits are not finite"


class Choice:
    """One continuation; what :class:`gpt2cupy.server.link.Stream` asks for.

    Parameters
    ----------
    answer : Answer
    index : int
        Of the choice.
    request : Request

    Attributes
    ----------
    number : int
        Of its stream.
    count : int
        Tokens that belong to it so far.
    """

    def __init__(self, answer: Answer, index: int, request: Request) -> None:
        self.answer, self.index, self.request = answer, index, request
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]]] | None = [] if request.params.logprobs else None
        self.reason: str | None = None
        self.number = 0
        self.count = 0
        self.closed = False

    def fail(self, status: int, message: str) -> None:
        self.answer.fail(status, message)

    def scored(self, logprobs: list[float], top: list[list[tuple[int, float]]]) -> None:
        raise AssertionError("a choice asks for no score")

    def flush(self) -> None:
        raise NotImplementedError

    def completion(self) -> Completion:
        raise NotImplementedError

    def _close(self) -> None:
        self.closed = True
        self.answer.choice_ended()

    def _failed(self) -> bool:
        """Whether its logits were not finite; its whole answer ends then."""
        if self.reason != "error":
            return False
        self.closed = True
        self.answer.fail(500, _NON_FINITE, "non_finite_logits")
        return True


class WholeChoice(Choice):
    """A choice that is given when it is complete."""

    def __init__(self, answer: Answer, index: int, request: Request) -> None:
        super().__init__(answer, index, request)
        stops = request.params.stop
        self._growing = GrowingText(answer.texts.tokenizer, stops) if stops else None
        self._text: list[str] = []

    def flush(self) -> None:
        if self.closed or self._failed():
            return
        if self._growing is None:
            self.count = len(self.ids)
        else:
            while self.count < len(self.ids):
                self.count += 1
                reason = self.reason if self.count == len(self.ids) else None
                text, reason = self._growing.push(self.ids[self.count - 1], reason)
                self._text.append(text)
                if reason is not None:
                    if self.reason is None:
                        self.answer.stop(self)
                    self.reason = reason
                    del self.ids[self.count :]  # what came with the stop string
        if self.reason is not None and not self.answer.waits_for_score(self.index):
            self._close()

    def completion(self) -> Completion:
        ids, reason = self.ids[: self.count], self.reason or "length"
        if self._growing is not None:
            text = "".join(self._text)
        else:
            shown = ids if reason == "length" else ids[:-1]
            text = text_of(self.answer.texts.tokenizer, shown)
        top = self.top[: self.count] if self.top else [[]] * self.count
        prompt = self.request.prompt.tolist()
        return Completion(text, ids, self.logprobs[: self.count], reason, prompt, top)


class StreamedChoice(Choice):
    """A choice whose text is sent as it comes."""

    def __init__(self, answer: Answer, index: int, request: Request) -> None:
        super().__init__(answer, index, request)
        asked = answer.asked
        usage = asked.include_usage or asked.continuous_usage
        self._before, self._after = answer.form.around(index, usage=usage)
        self._opened = False
        self._offset = 0  # characters of text before the next token
        self._plain = not (
            request.params.stop or request.params.logprobs is not None or asked.continuous_usage
        )
        self._text = JsonText(answer.texts)
        self._growing = GrowingText(answer.texts.tokenizer, request.params.stop)

    def flush(self) -> None:
        if self.closed or self._failed() or self.answer.waits_for_score(self.index):
            return
        if not self._opened:
            self._open()
        ids = self.ids
        most = self.answer.event_tokens
        if most and len(ids) > most:
            for start in range(0, len(ids), most):
                part = slice(start, start + most)
                top = self.top[part] if self.top is not None else None
                last = start + most >= len(ids)
                self._push(ids[part], self.logprobs[part], top, self.reason if last else None)
                if self.closed:
                    return
        else:
            self._push(ids, self.logprobs, self.top, self.reason)
        ids.clear()
        self.logprobs.clear()
        if self.top is not None:
            self.top.clear()

    def _open(self) -> None:
        self._opened = True
        if first := self.answer.form.first(self.index):
            self.answer.write(first)
        asked = self.answer.asked
        if not asked.echo:
            return
        prompt = asked.prompts[self.index // asked.params.n]
        ids = self.request.prompt.tolist()
        if not isinstance(prompt, str):
            prompt = text_of(self.answer.texts.tokenizer, ids)
        self._offset = len(prompt)
        logprobs = None
        if (score := self.answer.score_of(self.index)) is not None:
            values, top = [None, *score.logprobs], [[], *score.top]
            logprobs = self.answer.form.logprobs(self.answer.names, ids, values, top, 0)
        self._write(in_json(prompt), logprobs, None)

    def _push(
        self,
        ids: list[int],
        values: list[float],
        top: list[list[tuple[int, float]]] | None,
        reason: str | None,
    ) -> None:
        self.count += len(ids)
        if not self._plain:
            self._push_slowly(ids, values, top, reason)
            return
        if reason is None:
            if text := self._text.push(ids):
                self.answer.write(b"%b%b%b" % (self._before, text, self._after))
            return
        # A token that ends the text is no part of it.
        shown = ids if reason == "length" else ids[:-1]
        text = self._text.push(shown) + self._text.flush()
        self._write(text, None, reason)
        self._close()

    def _push_slowly(
        self,
        ids: list[int],
        values: list[float],
        top: list[list[tuple[int, float]]] | None,
        reason: str | None,
    ) -> None:
        """With stop strings, log-probabilities, or usage in each event."""
        pieces, found = [], reason
        for place, id_ in enumerate(ids):
            last = place == len(ids) - 1
            piece, found = self._growing.push(id_, reason if last else None)
            pieces.append(piece)
            if found is not None and not last:  # a stop string before what came with it
                self.count -= len(ids) - place - 1
                ids = ids[: place + 1]
                break
        if found is not None and reason is None:
            self.answer.stop(self)
        logprobs = None
        if self.request.params.logprobs is not None:
            logprobs = self._logprobs(ids, values, top, found)
        text = "".join(pieces)
        if text or found is not None or (logprobs and ids):
            self._write(in_json(text), logprobs, found)
        if found is not None:
            self._close()

    def _logprobs(
        self,
        ids: list[int],
        values: list[float],
        top: list[list[tuple[int, float]]] | None,
        reason: str | None,
    ) -> Any:
        """Of the tokens of a piece that have a part in the text: an end has none."""
        shown = ids[:-1] if reason in ("eos", "stop") else ids
        count = len(shown)
        best = top[:count] if top else [[]] * count
        form, names = self.answer.form, self.answer.names
        found = form.logprobs(names, shown, values[:count], best, self._offset)
        self._offset += len(text_of(names.tokenizer, shown))
        return found

    def _write(self, text: bytes, logprobs: Any, reason: str | None) -> None:
        answer, asked = self.answer, self.answer.asked
        usage = None
        if asked.continuous_usage:
            usage = usage_object(len(self.request.prompt), self.count)
        with_usage = asked.include_usage or asked.continuous_usage
        answer.write(
            answer.form.event(
                self.index, text, logprobs=logprobs, reason=reason, usage=usage,
                with_usage=with_usage,
            )
        )  # fmt: skip
