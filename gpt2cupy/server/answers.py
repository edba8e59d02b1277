"""Requests on their way: choices that grow by what the engine sends, and what their clients get."""

from __future__ import annotations

import asyncio
from typing import Any

from ..generation.completion_request import CompletionRequest
from ..generation.completion_response import completion_response, usage_object
from ..generation.request import Request
from ..generation.text import Completion, PromptScore
from . import messages
from .choices import Choice, StreamedChoice, WholeChoice
from .forms import DONE, CompletionForm, error_event
from .http import ApiError, Connection, error_in_form
from .link import EngineLink
from .messages import Score, Submit
from .token_text import TokenText

Names = Any


class Answer:
    """A request that was accepted.

    Parameters
    ----------
    link : EngineLink
    texts : TokenText
    names : TokenNames
    form : CompletionForm
    asked : CompletionRequest
    requests : list of Request
        ``n`` for each prompt.
    arrived : float
        By ``time.monotonic``.
    event_tokens : int
        Tokens of an event at most; 0 is any number.

    Attributes
    ----------
    error : ApiError or None
        Why it got no answer, or only a part of one.
    """

    def __init__(
        self,
        link: EngineLink,
        texts: TokenText,
        names: Names,
        form: CompletionForm,
        asked: CompletionRequest,
        requests: list[Request],
        arrived: float,
        event_tokens: int = 0,
    ) -> None:
        self.link, self.texts, self.names = link, texts, names
        self.form, self.asked, self.requests = form, asked, requests
        self.event_tokens = event_tokens
        self.error: ApiError | None = None
        self.events = 0
        self.parts: list[bytes] = []  # of a stream, not yet written
        self.connection: Connection | None = None  # while parts may go past ASGI
        self.ended = False
        self.scores: list[PromptScore | None] = [None] * len(asked.prompts)
        self._waiter: asyncio.Future[None] | None = None
        self._arrived = arrived
        kind = StreamedChoice if asked.stream else WholeChoice
        self.choices: list[Choice] = [kind(self, i, r) for i, r in enumerate(requests)]
        self._open = len(self.choices)
        self._numbers: list[int] = []

    def submit(self) -> None:
        """Send everything to the engine."""
        posted: list[Any] = []
        if self.asked.scores_prompts:
            for number in range(len(self.asked.prompts)):
                prompt = self.requests[number * self.asked.params.n].prompt
                stream = self.link.open(_ScoreStream(self, number))
                self._numbers.append(stream)
                posted.append(
                    Score(stream, messages.packed(prompt), self.asked.params.logprobs or 0)
                )
        params: dict[int, dict[str, Any]] = {}  # those of one prompt are one object
        for choice, request in zip(self.choices, self.requests, strict=True):
            if request.params.max_new_tokens == 0:
                continue
            stream = self.link.open(choice)
            self._numbers.append(stream)
            choice.number = stream
            own = id(request.params)
            if own not in params:
                params[own] = messages.params_of(request.params)
            posted.append(
                Submit(
                    stream,
                    messages.packed(request.prompt),
                    params[own],
                    request.index,
                    list(request.ends),
                    self._arrived,
                )
            )
        if posted:
            self.link.send(posted)
        if self.asked.params.max_new_tokens == 0:
            for choice in self.choices:
                choice.reason = "length"
                choice.flush()

    # -- what choices tell -------------------------------------------------------------------------

    def score_of(self, index: int) -> PromptScore | None:
        """That of the prompt of a choice."""
        return self.scores[index // self.asked.params.n]

    def waits_for_score(self, index: int) -> bool:
        """Whether the log-probabilities of a choice's prompt are still to come."""
        return self.asked.scores_prompts and self.score_of(index) is None

    def scored(self, number: int, score: PromptScore) -> None:
        """Take the log-probabilities of a prompt; choices that waited for them go on."""
        self.scores[number] = score
        n = self.asked.params.n
        for choice in self.choices[number * n : (number + 1) * n]:
            choice.flush()

    def write(self, event: bytes) -> None:
        """Send an event: at once where nothing waits to be written before it."""
        self.events += 1
        if self.connection is not None and not self.parts and self.connection.write_chunk(event):
            return
        self.parts.append(event)
        self._wake()

    def choice_ended(self) -> None:
        """Count a choice that has its last token."""
        self._open -= 1
        if not self._open and not self.ended:
            if self.asked.stream:
                if self.asked.include_usage:
                    self.parts.append(self.form.usage_event(self.usage()))
                self.parts.append(DONE)
            self._end()

    def stop(self, choice: Choice) -> None:
        """End the engine's work on a choice that met a stop string."""
        self.link.close([choice.number])

    def fail(self, status: int, message: str, code: str | None = None) -> None:
        """End with an error; what has not come does not come."""
        if self.ended:
            return
        self.error = ApiError(status, message, code=code)
        if self.asked.stream:
            self.parts += [error_event(error_in_form(status, message, code=code)), DONE]
        self.close()

    def close(self) -> None:
        """End, whatever is still to come."""
        if not self.ended:
            self._end()
            self.link.close(self._numbers)

    # -- what the client's side asks ---------------------------------------------------------------

    async def wait(self) -> None:
        """Until there are parts to write, or it has ended."""
        if self.ended or self.parts:
            return
        self._waiter = asyncio.get_running_loop().create_future()
        await self._waiter
        self._waiter = None

    def take_parts(self) -> bytes:
        """What is to be written."""
        data = self.parts[0] if len(self.parts) == 1 else b"".join(self.parts)
        self.parts.clear()
        return data

    def usage(self) -> dict[str, int]:
        """Tokens so far."""
        prompts = sum(len(r.prompt) for r in self.requests[:: self.asked.params.n])
        return usage_object(prompts, sum(choice.count for choice in self.choices))

    def whole(self) -> dict[str, Any]:
        """The answer that is no stream."""
        completions: list[Completion] = [choice.completion() for choice in self.choices]
        scores = [score for score in self.scores if score is not None]
        found = completion_response(
            self.names, self.asked, completions, id_=self.form.id, created=self.form.created,
            model=self.form.model, scores=scores or None,
        )  # fmt: skip
        return self.form.whole(found, completions)

    def _end(self) -> None:
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class _ScoreStream:
    """Waits for the log-probabilities of a prompt."""

    def __init__(self, answer: Answer, number: int) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.top: list[list[tuple[int, float]]] | None = None
        self.reason: str | None = None
        self._answer = answer
        self._number = number

    def flush(self) -> None:
        pass

    def fail(self, status: int, message: str) -> None:
        self._answer.fail(status, message)

    def scored(self, logprobs: list[float], top: list[list[tuple[int, float]]]) -> None:
        score = PromptScore(logprobs, top or [[]] * len(logprobs))
        self._answer.scored(self._number, score)
