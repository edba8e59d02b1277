"""Completions in OpenAI's form: the object that answers a completion request, and its parts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from ..errors import TokenizerError
from ..tokenizer import Tokenizer
from .completion_request import CompletionRequest
from .text import Completion, GrowingText, PromptScore

# How OpenAI names the reasons; "error" never gets here.
FINISH_REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class TokenNames(dict[int, str]):
    r"""The text of single tokens, made when first asked for.

    A token that is part of a character only is named by its bytes, ``bytes:\xe2\x80``, so that
    two of them are not one name; one that the tokenizer has not, by its id.

    Attributes
    ----------
    parts : set of int
        Tokens, of those asked for, that are no whole characters.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.parts: set[int] = set()

    def __missing__(self, id_: int) -> str:
        try:
            data = self.tokenizer.decode_bytes([id_])
            name = data.decode()
        except UnicodeDecodeError:
            self.parts.add(id_)
            name = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
        except TokenizerError:
            self.parts.add(id_)
            name = f"token_id:{id_}"
        self[id_] = name
        return name


def logprobs_object(
    names: TokenNames,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[Sequence[tuple[int, float]] | None],
    start: int = 0,
) -> dict[str, Any]:
    """The field ``logprobs`` of a choice, or of a piece of one.

    Parameters
    ----------
    names : TokenNames
    ids : sequence of int [N]
    logprobs : sequence of float or None [N]
        None for the first token of a prompt, which nothing stands before.
    top : sequence of sequences of (int, float) [N]
        Most probable tokens with each; an empty one is null, to others the token itself is added.
    start : int
        Characters of text before the first token.

    Returns
    -------
    dict
        ``tokens``, ``token_logprobs``, ``top_logprobs`` and ``text_offset``, each of N.
    """
    texts = [names[id_] for id_ in ids]
    best: list[dict[str, float] | None] = []
    for text, logprob, pairs in zip(texts, logprobs, top, strict=True):
        if not pairs or logprob is None:
            best.append(None)
            continue
        best.append(found := {names[id_]: value for id_, value in pairs})
        found.setdefault(text, logprob)
    return {
        "tokens": texts,
        "token_logprobs": list(logprobs),
        "top_logprobs": best,
        "text_offset": _offsets(names, ids, texts, start),
    }


def _offsets(names: TokenNames, ids: Sequence[int], texts: list[str], start: int) -> list[int]:
    """Characters of text that come before each token."""
    if names.parts.isdisjoint(ids):
        return list(accumulate(map(len, texts), initial=start))[:-1]
    growing, found = GrowingText(names.tokenizer, ()), []
    for id_ in ids:
        found.append(start)
        start += len(growing.decode(id_))
    return found


def choice_object(
    names: TokenNames,
    request: CompletionRequest,
    completion: Completion,
    index: int,
    prompt: str | Sequence[int] = "",
    score: PromptScore | None = None,
) -> dict[str, Any]:
    """One of ``choices``.

    Parameters
    ----------
    names : TokenNames
    request : CompletionRequest
    completion : Completion
    index : int
        Number of the prompt times ``n``, plus the number of the continuation.
    prompt : str or sequence of int
        As the body has it; for ``echo``.
    score : PromptScore, optional
        Of the prompt's tokens, where ``request.scores_prompts``.
    """
    text = completion.text
    before = ""
    if request.echo:
        ids = completion.prompt_ids
        before = prompt if isinstance(prompt, str) else names.tokenizer.decode(ids)
    logprobs = None
    if request.params.logprobs is not None:
        shown = _shown(names, completion)
        ids, values = completion.tokens[:shown], completion.logprobs[:shown]
        own = logprobs_object(names, ids, values, completion.top[:shown], len(before))
        logprobs = own
        if score is not None:
            echoed = logprobs_object(
                names, completion.prompt_ids, [None, *score.logprobs], [None, *score.top]
            )
            logprobs = {name: echoed[name] + own[name] for name in own}
    return {
        "index": index,
        "text": before + text,
        "logprobs": logprobs,
        "finish_reason": FINISH_REASONS[completion.finish_reason],
    }


def _shown(names: TokenNames, completion: Completion) -> int:
    """How many tokens of a completion have a part in its text: an end token has none."""
    ids, text = completion.tokens, completion.text
    if completion.finish_reason == "length":
        return len(ids)
    if completion.finish_reason == "eos":
        return len(ids) - 1
    offsets = _offsets(names, ids, [names[id_] for id_ in ids], 0)
    return sum(offset < len(text) for offset in offsets)


def completion_response(
    names: TokenNames,
    request: CompletionRequest,
    completions: Sequence[Completion],
    *,
    id_: str,
    created: int,
    model: str,
    scores: Sequence[PromptScore] | None = None,
) -> dict[str, Any]:
    """The object that answers a request.

    Parameters
    ----------
    names : TokenNames
    request : CompletionRequest
    completions : sequence of Completion
        ``n`` of each prompt, in the order of :meth:`CompletionRequest.requests`.
    id_ : str
    created : int
        Seconds since 1970.
    model : str
    scores : sequence of PromptScore, optional
        One of each prompt, where ``request.scores_prompts``.
    """
    n = request.params.n
    choices = [
        choice_object(
            names,
            request,
            completion,
            index,
            request.prompts[index // n],
            scores[index // n] if scores else None,
        )
        for index, completion in enumerate(completions)
    ]
    prompt_tokens = sum(each.prompt_tokens for each in completions[::n])
    completion_tokens = sum(len(each.tokens) for each in completions)
    return {
        "id": id_,
        "object": "text_completion",
        "created": created,
        "model": model,
        "choices": choices,
        "usage": usage_object(prompt_tokens, completion_tokens),
    }


def usage_object(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """The field ``usage``."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
