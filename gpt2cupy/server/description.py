"""The interface as an OpenAPI document, which ``/openapi.json`` answers."""

from __future__ import annotations

from typing import Any

from .._version import __version__
from ..sampling import MAX_CONTINUATIONS, MAX_LOGPROBS

Schema = dict[str, Any]


def _number(least: float | None = None, most: float | None = None, kind: str = "number") -> Schema:
    found: Schema = {"type": [kind, "null"]}
    if least is not None:
        found["minimum"] = least
    if most is not None:
        found["maximum"] = most
    return found


def _integer(least: int | None = None, most: int | None = None) -> Schema:
    return _number(least, most, "integer")


_FLAG = {"type": ["boolean", "null"]}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOP = {
    "anyOf": [
        {"type": ["string", "null"], "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}},
    ]
}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}


def _sampling(context: int) -> Schema:
    return {
        "model": {"type": ["string", "null"]},
        "max_tokens": _integer(0, context),
        "min_tokens": _integer(0, context),
        "temperature": _number(0),
        "top_p": {**_number(most=1), "exclusiveMinimum": 0},
        "top_k": _integer(-1),
        "min_p": _number(0, 1),
        "repetition_penalty": {**_number(), "exclusiveMinimum": 0},
        "presence_penalty": _number(),
        "frequency_penalty": _number(),
        "logit_bias": {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
        "seed": _integer(-(2**63), 2**64 - 1),
        "stop": _STOP,
        "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
        "ignore_eos": _FLAG,
        "n": _integer(1, MAX_CONTINUATIONS),
        "stream": _FLAG,
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": _FLAG, "continuous_usage_stats": _FLAG},
        },
        "user": {"type": ["string", "null"]},
    }


def _completion(context: int) -> Schema:
    prompt = {
        "anyOf": [
            {"type": ["string", "null"]},
            _IDS,
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            {"type": "array", "items": _IDS, "minItems": 1},
        ]
    }
    own = {"prompt": prompt, "echo": _FLAG, "logprobs": _integer(0, MAX_LOGPROBS)}
    return {"type": "object", "properties": own | _sampling(context)}


def _chat(context: int) -> Schema:
    message = {
        "type": "object",
        "required": ["role", "content"],
        "properties": {"role": {"type": "string"}, "content": {"type": "string"}},
    }
    own = {
        "messages": {"type": "array", "items": message, "minItems": 1},
        "logprobs": _FLAG,
        "top_logprobs": _integer(0, MAX_LOGPROBS),
        "max_completion_tokens": _integer(0, context),
    }
    return {"type": "object", "required": ["messages"], "properties": own | _sampling(context)}


def _post(summary: str, body: Schema, *kinds: str) -> Schema:
    content: dict[str, Schema] = {kind: {} for kind in ("application/json", *kinds)}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
            "responses": {"200": {"description": "The answer.", "content": content}, **_errors()},
        }
    }


def _get(summary: str, kind: str = "application/json") -> Schema:
    answers = {"200": {"description": "The answer.", "content": {kind: {}}}, **_errors()}
    return {"get": {"summary": summary, "responses": answers}}


def _errors() -> Schema:
    content = {"application/json": {"schema": _ERROR}}
    return {
        name: {"description": text, "content": content}
        for name, text in (
            ("4XX", "What the client can put right."),
            ("5XX", "What it cannot."),
        )
    }


def description(model: str, context: int) -> Schema:
    """The OpenAPI document for a model of so many positions."""
    return {
        "openapi": "3.1.0",
        "info": {"title": f"gpt2cupy, serving {model}", "version": __version__},
        "paths": {
            "/v1/completions": _post(
                "Continue prompts.", _completion(context), "text/event-stream"
            ),
            "/v1/chat/completions": _post(
                "Continue a dialogue, where the server has a template.", _chat(context),
                "text/event-stream",
            ),
            "/v1/models": _get("The model that is served."),
            "/tokenize": _post(
                "Token ids of a text.",
                {
                    "type": "object",
                    "required": ["prompt"],
                    "properties": {
                        "model": {"type": ["string", "null"]},
                        "prompt": {"type": "string"},
                        "return_token_strs": _FLAG,
                    },
                },
            ),
            "/detokenize": _post(
                "Text of token ids.",
                {
                    "type": "object",
                    "required": ["tokens"],
                    "properties": {
                        "model": {"type": ["string", "null"]},
                        "tokens": {"type": "array", "items": {"type": "integer"}},
                    },
                },
            ),
            "/health": _get("Whether this process answers."),
            "/ready": _get("Whether completions are answered."),
            "/version": _get("The version."),
            "/metrics": _get("Counters for Prometheus.", "text/plain"),
        },
    }  # fmt: skip
