"""What a front process holds, and what one request does with it."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import checkpoint
from ..errors import InputError, NoTokenizerError, shown
from ..generation.completion_request import CompletionRequest
from ..generation.completion_response import TokenNames
from ..generation.generation_config import GenerationConfig
from ..generation.prompts import PromptEncoder
from ..generation.request import Request
from ..tokenizer import NoTokenizer, Tokenizer
from .answers import Answer
from .chat import ChatTemplate
from .forms import ChatForm, CompletionForm
from .http import ApiError
from .link import EngineLink
from .log import Log
from .metrics import Store, value_of
from .settings import Settings
from .token_text import TokenText

_IN_THREAD = 1 << 15  # bytes of a body whose text is encoded beside the event loop


class Front:
    """One of the processes that speak HTTP.

    Parameters
    ----------
    number : int
    settings : Settings

    Attributes
    ----------
    link : EngineLink
    draining : bool
        Whether it takes no more requests.
    active : set of Answer
        Accepted and not yet answered.
    """

    def __init__(self, number: int, settings: Settings) -> None:
        self.settings = settings
        self.store = Store(settings.folder, f"front-{number}")
        self.engine_store = Store(settings.folder, "engine")
        self.log = Log(settings)
        self.created = int(time.time())
        self.draining = False
        self.active: set[Answer] = set()
        source = checkpoint.open(
            settings.model, revision=settings.revision, variant=settings.variant,
            adapter=settings.adapter,
        )  # fmt: skip
        self.tokenizer = _tokenizer(settings, source.path)
        generation = GenerationConfig.beside(source.path, source.config)
        self.encoder = PromptEncoder(self.tokenizer, source.config, generation)
        self.config = source.config
        self.texts, self.names = TokenText(self.tokenizer), TokenNames(self.tokenizer)
        self.keys = _keys(settings.api_key_file)
        self.template = None
        if settings.chat_template is not None:
            names = self.tokenizer.special_tokens.items()
            tokens = {role: self.tokenizer.decode([id_]) for role, id_ in names}
            self.template = ChatTemplate(settings.chat_template, tokens)
        self._longest = max((len(t) for t in _texts(self.tokenizer)), default=1)
        self._threads = ThreadPoolExecutor(1)
        self.link: EngineLink = None  # type: ignore[assignment]  # in the loop, by connect()
        self.number = number

    def connect(self, on_ready: Callable[[], None]) -> None:
        """Inside the event loop; ``on_ready`` is called when an engine takes requests."""
        self.link = EngineLink(self.number, on_ready)

    @property
    def context(self) -> int:
        """Tokens of prompt and continuation."""
        about = self.link.about or {}
        return int(about.get("capacity") or self.config.n_positions)

    def allowed(self, authorization: bytes) -> bool:
        """Whether a header has one of the keys; takes as long for a wrong as for a right one."""
        kind, _, key = authorization.partition(b" ")
        given = key.strip() if kind.lower() == b"bearer" else b""
        found = [hmac.compare_digest(given, known) for known in self.keys]
        return any(found) or not self.keys

    async def accept(
        self, asked: CompletionRequest, arrived: float, *, chat: bool, size: int
    ) -> Answer:
        """Take a request that was understood.

        Raises
        ------
        ApiError
            If the server cannot take it now.
        InputError
            If it fits neither the model nor the limits.
        """
        self._check(asked)
        if size > _IN_THREAD:
            loop = asyncio.get_running_loop()
            requests = await loop.run_in_executor(self._threads, self._requests, asked)
        else:
            requests = self._requests(asked)
        # Again, as the engine may have gone meanwhile.
        self._check_open(len(requests))
        id_ = ("chatcmpl-" if chat else "cmpl-") + secrets.token_hex(12)
        form: CompletionForm
        if chat:
            form = ChatForm(id_, int(time.time()), self.settings.name, self.names)
        else:
            form = CompletionForm(id_, int(time.time()), self.settings.name)
        answer = Answer(
            self.link, self.texts, self.names, form, asked, requests, arrived,
            self.settings.event_tokens,
        )  # fmt: skip
        self.active.add(answer)
        self.store.add("gpt2cupy:requests_accepted")
        try:
            answer.submit()
        except BaseException:
            self.answered(answer, "error")
            raise
        return answer

    def answered(self, answer: Answer, outcome: str) -> None:
        """Count a request that has come to its end."""
        self.active.discard(answer)
        self.store.add("gpt2cupy:requests_answered", value=outcome)
        self.store.add("gpt2cupy:events_sent", answer.events)

    def check_model(self, name: Any) -> None:
        """Refuse a request to another model.

        Raises
        ------
        ApiError
        """
        if name not in (None, self.settings.name):
            raise ApiError(
                404, f"the model {shown(name)} is not served here, {self.settings.name!r} is",
                param="model", code="model_not_found",
            )  # fmt: skip

    def _check(self, asked: CompletionRequest) -> None:
        self.check_model(asked.model)
        count = len(asked.prompts) * asked.params.n
        if count > self.settings.max_choices:
            raise InputError(
                f"{count} continuations are more than {self.settings.max_choices}",
                where="n" if asked.params.n > len(asked.prompts) else "prompt",
                remedy="Ask for them in several requests.",
            )
        self._check_open(count)

    def _check_open(self, count: int) -> None:
        if self.draining:
            raise ApiError(503, "the server is being stopped", headers=[(b"connection", b"close")])
        if self.link.about is None:
            again = [(b"retry-after", b"1")]
            raise ApiError(503, "the engine is not ready yet", code="not_ready", headers=again)
        most = self.settings.max_waiting
        waiting = value_of(self.engine_store.numbers, "vllm:num_requests_waiting")
        slots = int(self.link.about["slots"])
        if waiting + count > most or self.link.streams + count > most + slots:
            again = [(b"retry-after", b"1")]
            raise ApiError(429, "too many requests wait", code="queue_full", headers=again)

    def _requests(self, asked: CompletionRequest) -> list[Request]:
        context = self.context
        for prompt in asked.prompts:
            # What cannot fit is refused before its text is looked at.
            tokens = len(prompt) // self._longest if isinstance(prompt, str) else len(prompt)
            if tokens > context:
                raise InputError(
                    f"a prompt of at least {tokens} tokens exceeds the context of {context}",
                    where="prompt",
                    remedy="Shorten it.",
                )
        requests = asked.requests(self.encoder)
        wanted = asked.params.must_fit
        for request in requests[:: asked.params.n]:
            if len(request.prompt) + max(wanted, 1) - 1 > context:
                raise InputError(
                    f"a prompt of {len(request.prompt)} and {wanted} new tokens exceed the "
                    f"context of {context}",
                    where="max_tokens",
                    remedy="Shorten the prompt or ask for fewer.",
                )
        return requests


def _tokenizer(settings: Settings, path: Path) -> Tokenizer:
    if settings.tokenizer is not None:
        return Tokenizer.from_path(settings.tokenizer)
    try:
        return Tokenizer.from_path(path)
    except NoTokenizerError as reason:
        return NoTokenizer(reason)


def _texts(tokenizer: Tokenizer) -> list[bytes]:
    """All that single tokens stand for."""
    found = []
    for id_ in range(tokenizer.vocab_size):
        try:
            found.append(tokenizer.decode_bytes([id_]))
        except Exception:  # an id that is not there
            continue
    return found


def _keys(path: str | None) -> list[bytes]:
    """The keys of a file, one a line; lines that begin with # are comments."""
    if path is None:
        return []
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"the file of API keys cannot be read: {error.strerror}",
            where=path,
            remedy="Give a file that the server may read.",
        ) from error
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith(b"#")]
    if not keys:
        raise InputError("the file of API keys has none", where=path, remedy="Write one a line.")
    return keys
