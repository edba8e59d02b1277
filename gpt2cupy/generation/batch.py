"""A batch: the requests of a file run through an engine, answers written as they come."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any

from ..errors import Gpt2CupyError, InputError, TokenizerError, kind_of, shown
from . import scoring
from .batch_file import BatchInput, BatchOutput, InputLine, custom_id_of, parsed
from .collect import Collector
from .completion_request import CompletionParser, CompletionRequest, error_object, status_of
from .completion_response import TokenNames, completion_response
from .prompts import PromptEncoder
from .request import Request
from .session import Session
from .text import Completion, PromptScore

URL = "/v1/completions"
_DECIMALS = 6  # of log-probabilities: beyond what float16 leaves of them
_AT_ONCE = 32  # requests read between two steps, and scored together


@dataclass
class BatchSummary:
    """What came of a batch.

    Attributes
    ----------
    requests : int
        Of the whole file.
    before : int
        Answered in an earlier run.
    failed : int
        Answers that are errors, in this run or an earlier one.
    prompt_tokens, completion_tokens : int
        Of this run.
    seconds : float
        Of this run.
    ignored : set of str
        Fields of requests that mean nothing here, among them ``model`` where it is another one.
    """

    requests: int
    before: int
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    ignored: set[str] = field(default_factory=set)


class _Line:
    """A request of the file on its way to its answer."""

    def __init__(self, number: int, custom_id: str, asked: CompletionRequest) -> None:
        self.number = number
        self.custom_id = custom_id
        self.asked = asked
        self.requests: list[Request] = []
        self.made: dict[Any, Completion] = {}
        self.scores: list[PromptScore] | None = None

    @property
    def complete(self) -> bool:
        """Whether all its continuations are finished."""
        return len(self.made) == len(self.requests)


def _nameless(found: Any, place: int) -> InputError:
    """The error of a line without a name to answer it by: it says which line of the file it is."""
    if not isinstance(found, dict):
        what = f"the line is {kind_of(found)}, not an object"
    elif found.get("custom_id") is None:
        what = "there is no custom_id"
    else:
        name = found["custom_id"]
        what = "the custom_id is empty"
        if name != "":
            what = f"the custom_id is {shown(name)}, {kind_of(name)}, not a string"
    return InputError(
        what,
        where=f"line {place}",
        remedy="Write {custom_id, method, url, body}; OpenAI's format wants a string as custom_id.",
    )


@contextlib.contextmanager
def _frozen() -> Iterator[None]:
    """Let the garbage collector look at nothing that is there already.

    What a batch makes sets it off again and again, and each time it would go through all modules,
    which takes a third of the host's time.
    """
    ours = gc.get_freeze_count() == 0
    if ours:
        gc.freeze()
    try:
        yield
    finally:
        if ours:
            gc.unfreeze()


class Batch:
    """Runs the requests of a file.

    Parameters
    ----------
    session : Session
    encoder : PromptEncoder
    name : str
        Of the model, for the answers.
    requests : BatchInput
    answers : BatchOutput
    slots : int
        Sequences generated at once.
    """

    def __init__(
        self,
        session: Session,
        encoder: PromptEncoder,
        name: str,
        requests: BatchInput,
        answers: BatchOutput,
        slots: int,
    ) -> None:
        self._session = session
        self._encoder = encoder
        self._name = name
        self._answers = answers
        self._slots = slots
        self._names = TokenNames(encoder.tokenizer)
        self._parser = CompletionParser()
        self._collector = Collector(encoder.tokenizer, _DECIMALS)
        self._lines: dict[int, _Line] = {}
        self._scorer: scoring.Scorer | None = None
        self.summary = BatchSummary(len(requests), sum(answers.done))

    def run(self, done: Callable[[int], object] = lambda count: None) -> BatchSummary:
        """Answer every request that has no answer yet.

        Parameters
        ----------
        done : callable, optional
            Called with the number of requests that were answered since it was last called.
        """
        start = time.perf_counter()
        if self.summary.before == self.summary.requests:
            self.summary.failed = self._answers.failed
            return self.summary
        with (
            _frozen(),
            contextlib.closing(self._answers.unanswered()) as unanswered,
            contextlib.closing(
                self._session.blocks(self._requests(unanswered, done), self._slots)
            ) as blocks,
        ):
            for block in blocks:
                for key in self._collector.push(block):
                    self._session.cancel(key)
                self._answer_finished(done)
        if not all(self._answers.done):
            raise InputError(
                "the file of requests has lost lines while it was read",
                where=str(self._answers.requests.path),
                remedy="Start again: what is answered is kept.",
            )
        self.summary.failed = self._answers.failed
        self.summary.seconds = time.perf_counter() - start
        return self.summary

    def _requests(
        self, unanswered: Iterator[InputLine], done: Callable[[int], object]
    ) -> Iterator[Request | None]:
        """What the engine is to run, read as slots become free."""
        while some := list(islice(unanswered, _AT_ONCE)):
            lines = []
            for each in some:
                custom_id = None
                try:
                    found = parsed(each.text, each.place)
                    custom_id = custom_id_of(found)
                    if custom_id is None:
                        raise _nameless(found, each.place)
                    lines.append(self._begun(each.number, custom_id, found))
                except (InputError, TokenizerError) as error:
                    self._refuse(each.number, custom_id, error)
                    done(1)
            self._score(lines)
            for line in lines:
                self._lines[line.number] = line
                for request in line.requests:
                    self._collector.add(request)
                yield from (r for r in line.requests if r.params.max_new_tokens != 0)
            self._answer_finished(done)  # those that asked for no token
            yield None

    def _begun(self, number: int, custom_id: str, found: dict[str, Any]) -> _Line:
        """A line as a request that can be run.

        Raises
        ------
        InputError
            If it is none.
        """
        for name, only in (("method", "POST"), ("url", URL)):
            if found.get(name) != only:
                raise InputError(
                    f"{name} is {shown(found.get(name))}", where=name, remedy=f"It must be {only}."
                )
        asked = self._parser.parse(found.get("body"))
        if asked.stream:
            raise InputError(
                "an answer in a file is not streamed", where="stream", remedy="Leave it out."
            )
        self.summary.ignored.update(asked.ignored)
        if asked.model not in (None, self._name):
            self.summary.ignored.add("model")
        line = _Line(number, custom_id, asked)
        line.requests = [
            dataclasses.replace(request, key=(number, *request.key))
            for request in asked.requests(self._encoder)
        ]
        return line

    def _score(self, lines: list[_Line]) -> None:
        """Score the prompts of lines that ask for it, those of equal settings together."""
        by_top: dict[int, list[_Line]] = {}
        for line in lines:
            if line.asked.scores_prompts:
                by_top.setdefault(line.asked.params.logprobs or 0, []).append(line)
        if by_top and self._scorer is None:
            self._scorer = scoring.Scorer(self._session.model)
        for top, several in by_top.items():
            ids = [[r.prompt for r in line.requests[:: line.asked.params.n]] for line in several]
            assert self._scorer is not None
            found = scoring.prompt_scores(self._scorer, chain.from_iterable(ids), top)
            for line, own in zip(several, ids, strict=True):
                line.scores = list(islice(found, len(own)))

    def _answer_finished(self, done: Callable[[int], object]) -> None:
        """Write the answers of requests whose last continuation is finished."""
        count = 0
        for request, completion in self._collector.take():
            line = self._lines[request.key[0]]
            line.made[request.key] = completion
            if line.complete:
                del self._lines[line.number]
                self._answer(line)
                count += 1
        if count:
            done(count)

    def _answer(self, line: _Line) -> None:
        completions = [line.made[request.key] for request in line.requests]
        scores = [value for score in line.scores or () for value in score.logprobs]
        failed = any(each.finish_reason == "error" for each in completions)
        if failed or any(map(math.isnan, scores)):
            error = scoring.non_finite(self._session.model, f"request {line.number + 1}")
            self._refuse(line.number, line.custom_id, error)
            return
        body = completion_response(
            self._names, line.asked, completions, id_=f"cmpl-{line.number}",
            created=int(time.time()), model=self._name, scores=line.scores,
        )  # fmt: skip
        self._answers.write(line.number, line.custom_id, 200, body)
        self.summary.prompt_tokens += body["usage"]["prompt_tokens"]
        self.summary.completion_tokens += body["usage"]["completion_tokens"]

    def _refuse(self, number: int, custom_id: str | None, error: Gpt2CupyError) -> None:
        """Write an error in place of an answer."""
        found = error_object(error)
        short = {"code": found["code"], "message": found["message"]}
        self._answers.write(number, custom_id, status_of(error), {"error": found}, short)
