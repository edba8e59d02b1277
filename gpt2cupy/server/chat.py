"""``/v1/chat/completions``: messages become a prompt by a template that whoever serves gives."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError, shown
from ..generation.completion_request import CompletionRequest, completion_request
from .http import ApiError

NO_TEMPLATE = (
    "this model has no chat template: GPT-2 continues texts and was never taught to answer "
    "messages. Use /v1/completions, or start the server with --chat-template FILE."
)
_CHAT_ONLY = ("messages", "top_logprobs", "max_completion_tokens", "logprobs")
_REFUSED = ("tools", "tool_choice", "functions", "function_call", "response_format", "audio")


class ChatTemplate:
    """A template in Jinja's language, as checkpoints of Hugging Face have them.

    Parameters
    ----------
    path : str or path
    tokens : mapping of str to str
        Special tokens that it may name, such as ``eos_token``.
    """

    def __init__(self, path: str | Path, tokens: Mapping[str, str]) -> None:
        import jinja2.sandbox

        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True
        )
        environment.globals["raise_exception"] = _raise
        try:
            text = Path(path).read_text(encoding="utf-8")
            self._template = environment.from_string(text)
        except (OSError, UnicodeDecodeError, jinja2.TemplateError) as error:
            raise InputError(
                f"the chat template cannot be read: {getattr(error, 'strerror', None) or error}",
                where=str(path),
                remedy="Give a file with a template in Jinja's language.",
            ) from error
        self._tokens = dict(tokens)

    def prompt(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
        """The text of messages.

        Raises
        ------
        InputError
            If the template refuses them.
        """
        import jinja2

        try:
            return self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"the chat template refuses these messages: {error}",
                where="messages",
                remedy="Send messages in the order and with the roles that the template takes.",
            ) from error


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def chat_request(body: Any, template: ChatTemplate | None) -> CompletionRequest:
    """The completion request that a body of chat stands for.

    Raises
    ------
    ApiError
        If there is no template.
    InputError
        If a value is impossible.
    """
    if template is None:
        raise ApiError(400, NO_TEMPLATE, code="no_chat_template")
    if not isinstance(body, Mapping):
        return completion_request(body)  # which refuses it
    for name in _REFUSED:
        if body.get(name) not in (None, [], "none", {"type": "text"}):
            raise InputError(f"{name} is not supported", where=name, remedy="Leave it out.")
    rest = {name: value for name, value in body.items() if name not in _CHAT_ONLY}
    rest["logprobs"] = _logprobs(body)
    limit = body.get("max_completion_tokens")
    if limit is not None:
        rest["max_tokens"] = limit
    add = rest.pop("add_generation_prompt", True)
    prompt = template.prompt(_messages(body.get("messages")), add_generation_prompt=bool(add))
    asked = completion_request({**rest, "prompt": prompt})
    if asked.echo:
        raise InputError("echo is not supported in a chat", where="echo", remedy="Leave it out.")
    if limit is None and body.get("max_tokens") is None:  # to the end of the context
        params = dataclasses.replace(asked.params, max_new_tokens=None)
        return dataclasses.replace(asked, params=params)
    return asked


def _logprobs(body: Mapping[str, Any]) -> int | None:
    wanted, top = body.get("logprobs"), body.get("top_logprobs")
    if wanted is not None and not isinstance(wanted, bool):
        raise InputError(
            f"logprobs={shown(wanted)} is impossible",
            where="logprobs",
            remedy="In a chat it is true or false.",
        )
    if not wanted:
        if top:
            raise InputError(
                "top_logprobs needs logprobs", where="top_logprobs", remedy="Set logprobs to true."
            )
        return None
    return 0 if top is None else top  # checked with the other settings


def _messages(given: Any) -> list[dict[str, Any]]:
    """Messages, their content as text."""
    if not isinstance(given, list) or not given:
        raise InputError(
            f"messages={shown(given)} is impossible",
            where="messages",
            remedy="It must be a list of objects with role and content.",
        )
    found = []
    for each in given:
        content = each.get("content") if isinstance(each, Mapping) else None
        if isinstance(content, list):  # parts, of which text can be taken
            parts = [part.get("text") for part in content if isinstance(part, Mapping)]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(content, str) or not isinstance(each.get("role"), str):
            raise InputError(
                f"the message {shown(each)} has no role or no text",
                where="messages",
                remedy="Give each a role and a content, both text.",
            )
        found.append({**each, "content": content})
    return found
