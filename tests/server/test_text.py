"""Text of choices: streamed in any pieces it is the text of the whole."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import pytest
from hypothesis import given

import gpt2cupy
from gpt2cupy.generation.completion_request import completion_request
from gpt2cupy.generation.completion_response import TokenNames
from gpt2cupy.server.answers import Answer
from gpt2cupy.server.forms import CompletionForm
from gpt2cupy.server.token_text import JsonText, TokenText


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load(device="cpu") as model:
        yield model


class Link:
    """An engine that says what a test makes it say."""

    def __init__(self):
        self.streams, self.closed = [], []

    def open(self, stream):
        self.streams.append(stream)
        return len(self.streams)

    def close(self, numbers):
        self.closed += numbers

    def send(self, posted):
        pass


ids_ = st.lists(st.integers(0, 2046), min_size=1, max_size=40)


@given(ids_, st.data())
def test_json_text_is_what_the_tokenizer_decodes(lm, ids, data):
    text, found = JsonText(TokenText(lm.tokenizer)), b""
    rest = list(ids)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += text.push(rest[:size])
        rest = rest[size:]
    found += text.flush()
    assert json.loads(b'"' + found + b'"') == lm.tokenizer.decode(ids)


def feed(lm, body, ids, sizes, *, stream, reason="length", event_tokens=0):
    """The answer to a body where the engine brings these ids, so many at a time."""
    asked = completion_request({"prompt": "a", "max_tokens": len(ids), **body, "stream": stream})
    requests = asked.requests(lm._encoder)
    link, names = Link(), TokenNames(lm.tokenizer)
    form = CompletionForm("id", 0, "model")
    answer = Answer(link, TokenText(lm.tokenizer), names, form, asked, requests, 0.0, event_tokens)
    answer.submit()
    (choice,) = link.streams
    place = 0
    for size in sizes:
        choice.ids += ids[place : place + size]
        choice.logprobs += [-1.0] * len(ids[place : place + size])
        place += size
        if place >= len(ids):
            choice.reason = reason
        choice.flush()
        if answer.ended:
            break
    assert answer.ended
    if not stream:
        return answer.whole()["choices"][0], [], link
    *events, done = b"".join(answer.parts).split(b"\n\n")[:-1]
    assert done == b"data: [DONE]"
    choices = [json.loads(event[6:])["choices"][0] for event in events]
    return (
        {
            "text": "".join(each["text"] for each in choices),
            "finish_reason": choices[-1]["finish_reason"],
        },
        choices,
        link,
    )


@given(ids_, st.data())
def test_a_stream_in_any_pieces_is_the_whole(lm, ids, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=len(ids), max_size=len(ids)))
    text = lm.tokenizer.decode(ids)
    body = {}
    if text and data.draw(st.booleans()):
        start = data.draw(st.integers(0, len(text) - 1))
        body["stop"] = text[start : start + data.draw(st.integers(1, 6))]
    if data.draw(st.booleans()):
        body["logprobs"] = 0
    reason = data.draw(st.sampled_from(["length", "eos"]))
    options = {"reason": reason, "event_tokens": data.draw(st.integers(0, 3))}
    whole, _, _ = feed(lm, body, ids, sizes, stream=False, **options)
    streamed, choices, _ = feed(lm, body, ids, sizes, stream=True, **options)
    assert streamed == {name: whole[name] for name in streamed}
    if "stop" in body and body["stop"] in text and reason == "length":
        assert whole["text"] == text[: text.index(body["stop"])]
        assert whole["finish_reason"] == "stop"
    so_far = ""
    for choice in choices:  # nothing of a stop string is ever shown
        so_far += choice["text"]
        assert whole["text"].startswith(so_far)


def test_a_stop_string_ends_the_engines_work(lm):
    ids = lm.tokenizer.encode("To be, or not to be")
    for stream in (False, True):
        found, _, link = feed(lm, {"stop": " not"}, ids, [1] * len(ids), stream=stream)
        assert found["text"] == "To be, or" and found["finish_reason"] == "stop"
        assert link.closed == [1]
