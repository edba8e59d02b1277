"""The body of a completion request in OpenAI's form: what a server and a batch file take.

No HTTP and no JSON text: objects in, settings and prompts out. Names are those of OpenAI's
completions endpoint, and those of vLLM for what OpenAI has not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ..errors import Gpt2CupyError, InputError, NonFiniteError, kind_of, shown
from ..sampling import SamplingParams
from .prompts import PromptEncoder
from .request import Request

DEFAULT_MAX_TOKENS = 16  # of OpenAI
LARGEST_SEED = 2**64

# Fields of SamplingParams by their names in a body; those that are named alike are not here.
_RENAMED = {"max_tokens": "max_new_tokens", "min_tokens": "min_new_tokens"}
_SAMPLING = (
    *("max_tokens", "min_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs"),
    "stop_token_ids",
)
_WITHOUT_EFFECT = ("user",)  # who asks changes nothing
_REFUSED = {
    "best_of": "Leave it out, ask for n completions and choose among them.",
    "suffix": "Leave it out: GPT-2 continues a text and fills no gap.",
}
_KNOWN = {
    *_SAMPLING,
    *_WITHOUT_EFFECT,
    *_REFUSED,
    *("prompt", "model", "echo", "ignore_eos", "stream", "stream_options"),
}
_IN_BODY = {ours: theirs for theirs, ours in _RENAMED.items()}
_OURS = re.compile(rf"\b({'|'.join(_IN_BODY)})\b")


@dataclass(frozen=True)
class CompletionRequest:
    """A body that was understood.

    Attributes
    ----------
    prompts : list of str or list of int
        At least one.
    params : SamplingParams
        Temperature 1 and at most 16 new tokens where the body does not say, as OpenAI has it.
    echo : bool
        Whether the prompt goes before the text, and its tokens before those of the text.
    stream : bool
        Whether pieces are asked for.
    include_usage, continuous_usage : bool
        Of ``stream_options``: the count of tokens in a last piece, and in each.
    model : str or None
    ignored : tuple of str
        Fields that mean nothing here, sorted.
    """

    prompts: list[Any]
    params: SamplingParams
    echo: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    model: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def scores_prompts(self) -> bool:
        """Whether the log-probabilities of the prompts' own tokens are asked for."""
        return self.echo and self.params.logprobs is not None

    def requests(self, encoder: PromptEncoder) -> list[Request]:
        """``n`` requests for each prompt, with keys (number of the prompt, continuation).

        One that asks for no token (``max_tokens`` of 0) is not for an engine.

        Raises
        ------
        InputError
            If prompt and new tokens do not fit the context, or an id is unknown.
        """
        single = len(self.prompts) == 1
        try:
            return encoder.requests(self.prompts, self.params, single=single)
        except Gpt2CupyError as error:
            raise in_body_words(error) from error


class CompletionParser:
    """Reads bodies; settings that came before are not checked again.

    Bodies of one list mostly differ in prompt and seed alone, and to check the rest costs more
    than to make a request of it.
    """

    def __init__(self) -> None:
        self._seen: dict[str, CompletionRequest] = {}

    def parse(self, body: Any) -> CompletionRequest:
        """:func:`completion_request`, with a memory."""
        if not isinstance(body, Mapping):
            return completion_request(body)
        rest = {name: value for name, value in body.items() if name not in ("prompt", "seed")}
        known = self._seen.get(key := repr(rest))
        if known is None:
            known = completion_request(rest)
            if len(self._seen) >= 64:
                self._seen.clear()
            self._seen[key] = known
        params, seed = known.params, body.get("seed")
        if seed is not None:
            try:
                params = params.with_seed(_seed(seed))
            except InputError as error:
                raise in_body_words(error) from error
        prompts = _prompts(body.get("prompt"))
        return dataclasses.replace(known, prompts=prompts, params=params)


def completion_request(body: Any) -> CompletionRequest:
    """Check the body of a request and take it apart.

    Parameters
    ----------
    body : mapping
        ``prompt`` (text, token ids, or a list of either; empty text starts from the
        beginning-of-text token), ``model``, ``max_tokens``, ``temperature``, ``top_p``, ``n``,
        ``stop``, ``seed``, ``logit_bias``, ``logprobs``, ``echo``, ``presence_penalty``,
        ``frequency_penalty``, ``stream``, ``stream_options``, ``user``; and vLLM's ``top_k``,
        ``min_p``, ``repetition_penalty``, ``min_tokens``, ``ignore_eos``, ``stop_token_ids``.
        null stands for the default.

    Returns
    -------
    CompletionRequest

    Raises
    ------
    InputError
        If a value is impossible, or ``best_of`` or ``suffix`` is given; ``where`` is the field.
    """
    if not isinstance(body, Mapping):
        raise InputError(
            f"the body of a request cannot be {kind_of(body)}",
            where="body",
            remedy="Send an object with the field prompt.",
        )
    given = {name: value for name, value in body.items() if value is not None}
    for name, remedy in _REFUSED.items():
        if name in given:
            raise InputError(f"{name} is not supported", where=name, remedy=remedy)
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping):
        _refuse("stream_options", options, "an object")
    model = given.get("model")
    if model is not None and not isinstance(model, str):
        _refuse("model", model, "a name")
    return CompletionRequest(
        prompts=_prompts(given.get("prompt")),
        params=_params(given),
        echo=_flag(given, "echo"),
        stream=_flag(given, "stream"),
        include_usage=_flag(options, "include_usage"),
        continuous_usage=_flag(options, "continuous_usage_stats"),
        model=model,
        ignored=tuple(sorted(str(name) for name in given if name not in _KNOWN)),
    )


def _params(given: Mapping[str, Any]) -> SamplingParams:
    """The settings of sampling that a body has."""
    settings: dict[str, Any] = {"max_new_tokens": DEFAULT_MAX_TOKENS, "temperature": 1.0}
    settings |= {_RENAMED.get(name, name): given[name] for name in _SAMPLING if name in given}
    if "logit_bias" in given:
        settings["logit_bias"] = _biases(given["logit_bias"])
    if "seed" in settings:
        settings["seed"] = _seed(settings["seed"])
    if settings.get("top_k") == -1:  # how vLLM writes "off"
        settings["top_k"] = 0
    if _flag(given, "ignore_eos"):
        settings["eos_token_id"] = -1
    try:
        return SamplingParams(**settings)
    except InputError as error:
        raise in_body_words(error) from error


def _seed(seed: Any) -> Any:
    """A seed, whose 64 bits may have been written with a sign."""
    signed = isinstance(seed, int) and -(LARGEST_SEED // 2) <= seed < 0
    return seed % LARGEST_SEED if signed else seed


def _biases(given: Any) -> dict[int, Any]:
    """A mapping of ids, which JSON writes as strings."""
    if not isinstance(given, Mapping):
        _refuse("logit_bias", given, "an object of token ids and numbers")
    found = {}
    for id_, value in given.items():
        text = str(id_)
        if not (text.isascii() and text.isdecimal() and len(text) < 10):
            _refuse("logit_bias", given, "an object whose names are token ids")
        found[int(text)] = value
    return found


def _prompts(given: Any) -> list[Any]:
    """The prompts of a body, text or lists of ids; their ids are checked with the vocabulary."""
    if given is None:
        return [""]
    if isinstance(given, str):
        return [given]
    if not isinstance(given, list | tuple) or not given:
        _refuse("prompt", given, "text, token ids, or a list of either that is not empty")
    if _is_ids(given):
        return [given]
    if not all(isinstance(each, str) or (each and _is_ids(each)) for each in given):
        _refuse("prompt", given, "text, token ids, or a list of either that is not empty")
    return list(given)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(
        isinstance(id_, int) and not isinstance(id_, bool) for id_ in value
    )


def _flag(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, value, "true or false")
    return bool(value)


def _refuse(name: str, value: Any, allowed: str) -> NoReturn:
    raise InputError(
        f"{name}={shown(value)} is impossible", where=name, remedy=f"It must be {allowed}."
    )


def in_body_words(error: Gpt2CupyError) -> Gpt2CupyError:
    """The error with the names of a body: max_tokens for max_new_tokens; ``where`` is the field."""
    what, remedy = (
        _OURS.sub(lambda match: _IN_BODY[match[1]], text) for text in (error.what, error.remedy)
    )
    where = error.where
    if where == "SamplingParams" and (named := re.match(r"(\w+)=", what)):
        where = named[1]
    return type(error)(what, where=where, remedy=remedy)


def status_of(error: BaseException) -> int:
    """The HTTP status that goes with an error: 400 for what the caller can put right, else 500."""
    return 400 if isinstance(error, InputError) else 500


def error_object(error: BaseException) -> dict[str, Any]:
    """An error in OpenAI's form.

    Returns
    -------
    dict
        ``message``, ``type``, ``param`` (the field at fault, or None) and ``code``, which is
        "invalid_request" for what the caller can put right, else "server_error".
    """
    ours = isinstance(error, Gpt2CupyError)
    caller = isinstance(error, InputError)
    code = "invalid_request" if caller else "server_error"
    if isinstance(error, NonFiniteError):
        code = "non_finite_logits"
    field = re.match(r"\w*", getattr(error, "where", ""))[0]  # type: ignore[index]
    return {
        "message": str(error) if ours else f"{type(error).__name__}: {error}",
        "type": "invalid_request_error" if caller else "server_error",
        "param": field if field in _KNOWN else None,
        "code": code,
    }
