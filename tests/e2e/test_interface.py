"""What clients may ask, on the embedded model."""

from __future__ import annotations

import json
import re

import pytest
from command import cli
from server_process import Served, events_of, text_of

import gpt2cupy
from gpt2cupy.record import ROOT
from gpt2cupy.server import http

PROMPT = "ROMEO:"


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load(device="cpu") as model:
        yield model


def test_a_completion_is_that_of_the_engine(served, lm):
    found = served.complete(prompt=PROMPT, max_tokens=12, temperature=0)
    expected = lm.generate(PROMPT, max_new_tokens=12)
    assert found["choices"][0]["text"] == expected.text
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"] == {"prompt_tokens": 2, "completion_tokens": 12, "total_tokens": 14}
    assert found["object"] == "text_completion" and found["model"] == "shakespeare"


def test_a_stream_is_the_same_text(served, lm):
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0.9, "seed": 5}
    events = served.events(**body)
    assert text_of(events) == served.complete(**body)["choices"][0]["text"]
    assert text_of(events) == lm.generate(PROMPT, max_new_tokens=40, temperature=0.9, seed=5).text
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons[-1] == "length" and not any(reasons[:-1])
    assert len({event["id"] for event in events}) == 1


def test_usage_comes_at_the_end_or_in_each_event(served):
    body = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0}
    *middle, last = served.events(**body, stream_options={"include_usage": True})
    assert all(event["usage"] is None for event in middle)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 6
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = served.events(**body, stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in events]
    assert counts == sorted(counts) and counts[-1] == 6 and counts[0] >= 1


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_with_logprobs_scores_the_prompt(served, lm, max_tokens):
    text = "ROMEO: I love thee"
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": 0, "echo": True}
    found = served.complete(**body, logprobs=1)["choices"][0]
    score = lm.score(text, bos=False)
    values = found["logprobs"]["token_logprobs"]
    assert found["text"].startswith(text)
    assert values[0] is None
    assert values[1 : 1 + len(score.logprobs)] == pytest.approx(score.logprobs.tolist(), abs=1e-4)
    assert len(values) == len(score.logprobs) + 1 + max_tokens
    streamed = served.events(**body, logprobs=1)
    assert text_of(streamed) == found["text"]
    pieces = [event["choices"][0]["logprobs"] for event in streamed]
    joined = [value for piece in pieces if piece for value in piece["token_logprobs"]]
    assert joined[1:] == pytest.approx(values[1:], abs=1e-4)


def test_logprobs_of_a_stream_are_those_of_the_answer(served):
    body = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "logprobs": 3}
    whole = served.complete(**body)["choices"][0]["logprobs"]
    events = served.events(**body)
    for name in ("tokens", "text_offset"):
        found = [v for e in events for v in e["choices"][0]["logprobs"][name]]
        assert found == whole[name]
    assert all(len(best) == 3 for best in whole["top_logprobs"])


def test_prompts_may_be_texts_ids_or_lists_of_either(served, lm):
    ids = lm.tokenizer.encode(PROMPT)
    text = served.complete(prompt=PROMPT, max_tokens=5, temperature=0)["choices"][0]["text"]
    for prompt, count in ((ids, 1), ([PROMPT, PROMPT], 2), ([ids, ids, ids], 3)):
        found = served.complete(prompt=prompt, max_tokens=5, temperature=0)["choices"]
        assert [choice["text"] for choice in found] == [text] * count
        assert [choice["index"] for choice in found] == list(range(count))


def test_n_continuations_have_texts_of_their_own(served):
    body = {"prompt": PROMPT, "max_tokens": 10, "n": 3, "seed": 1}
    texts = [choice["text"] for choice in served.complete(**body)["choices"]]
    assert len(set(texts)) == 3
    events = served.events(**body)
    assert [text_of(events, index) for index in range(3)] == texts


def test_a_stop_string_across_events_leaks_nothing(served):
    body = {"prompt": PROMPT, "max_tokens": 30, "temperature": 0}
    text = served.complete(**body)["choices"][0]["text"]
    stop = text[4:9]
    whole = served.complete(**body, stop=stop)["choices"][0]
    assert whole["text"] == text[:4] and whole["finish_reason"] == "stop"
    events = served.events(**body, stop=[stop, "never said"])
    assert text_of(events) == text[:4]
    assert events[-1]["choices"][0]["finish_reason"] == "stop"
    # A beginning of a stop string that goes on otherwise is text.
    other = served.events(**body, stop=text[4:9] + "\0")
    assert text_of(other) == text


def test_what_is_unknown_is_named_and_what_is_refused_too(served):
    body = {"prompt": PROMPT, "max_tokens": 1, "frobnicate": 1, "a\r\nb": 2}
    status, headers, _ = served.ask("POST", "/v1/completions", body)
    assert status == 200 and headers["x-ignored-fields"] == "a??b, frobnicate"
    for field, value in (("best_of", 2), ("suffix", "x")):
        status, _, data = served.ask("POST", "/v1/completions", {"prompt": "", field: value})
        error = json.loads(data)["error"]
        assert status == 400 and error["param"] == field
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body, status, param",
    [
        ({"temperature": -1}, 400, "temperature"),
        ({"max_tokens": 10**9}, 400, "prompt"),
        ({"max_tokens": 600}, 400, None),
        ({"prompt": [99999999]}, 400, "prompt"),
        ({"prompt": {}}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": "a " * 3000}, 400, "prompt"),
        ({"logit_bias": {"x": 1}}, 400, "logit_bias"),
        ({"n": 100000}, 400, "n"),
        ({"stream": "yes"}, 400, "stream"),
        ({"model": "other"}, 404, "model"),
    ],
)
def test_what_cannot_be_is_refused_in_openais_form(served, body, status, param):
    found, _, data = served.ask("POST", "/v1/completions", {"prompt": PROMPT, **body})
    error = json.loads(data)["error"]
    assert found == status and set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["code"], str)
    assert param is None or error["param"] == param


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1]", b"null", b"\xff\xfe", b'{"prompt": NaN}', b"[" * 50000, b'{"a":' * 9000],
)
def test_bodies_that_are_no_object_are_refused(served, data):
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        status, _, answer = served.ask("POST", path, data)
        assert status == 400 and "error" in json.loads(answer)


def test_paths_and_methods_that_are_not_there(served):
    status, _, data = served.ask("GET", "/nowhere")
    assert status == 404 and json.loads(data)["error"]["code"] == "not_found"
    status, headers, _ = served.ask("GET", "/v1/completions")
    assert status == 405 and headers["allow"] == "POST"
    assert served.ask("GET", "/v1/models/other")[0] == 404


def test_what_can_be_looked_up(served, lm):
    assert served.ask("GET", "/health")[0] == 200
    assert served.get("/ready")["ready"] is True
    assert served.get("/version") == {"version": gpt2cupy.__version__}
    (model,) = served.get("/v1/models")["data"]
    assert model["id"] == "shakespeare" and model["max_model_len"] == 512
    assert served.get("/v1/models/shakespeare") == model
    status, _, data = served.ask("POST", "/tokenize", {"prompt": PROMPT, "return_token_strs": True})
    found = json.loads(data)
    assert status == 200 and found["tokens"] == lm.tokenizer.encode(PROMPT)
    assert "".join(found["token_strs"]) == PROMPT
    status, _, data = served.ask("POST", "/detokenize", {"tokens": found["tokens"]})
    assert json.loads(data) == {"prompt": PROMPT}


@pytest.mark.parametrize(
    "path, body, param",
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "return_token_strs": "yes"}, "return_token_strs"),
        ("/tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens"),
        ("/detokenize", {"tokens": [[5]]}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [5], "model": 3}, "model"),
    ],
)
def test_ids_and_text_that_cannot_be_are_refused_by_their_field(served, path, body, param):
    status, _, data = served.ask("POST", path, body)
    error = json.loads(data)["error"]
    assert status == (404 if param == "model" else 400) and error["param"] == param
    assert param in error["message"] and isinstance(error["code"], str)


def test_the_examples_of_the_page_are_what_the_server_answers(served):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    example = r"curl http://127\.0\.0\.1:8000(/\S+) -d '(.*)'\n```\n\n```json\n(.*)\n"
    found = re.findall(example, page)
    assert [path for path, *_ in found] == ["/tokenize", "/detokenize"]
    for path, body, expected in found:
        assert json.loads(served.ask("POST", path, json.loads(body))[2]) == json.loads(expected)
    (error,) = re.findall(r'^({"error": .*})$', page, re.MULTILINE)
    body = {"prompt": PROMPT, "temperature": -1}
    assert json.loads(served.ask("POST", "/v1/completions", body)[2]) == json.loads(error)
    codes = set(re.findall(r"`(\w+)`", page.partition("| status | `code` |")[2].partition("##")[0]))
    assert set(http.CODES.values()) - {"client_gone"} <= codes


def test_ids_and_text_name_the_fields_that_mean_nothing(served):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})):
        status, headers, _ = served.ask("POST", path, {**body, "zebra": 1, "model": "shakespeare"})
        assert status == 200 and headers["x-ignored-fields"] == "zebra"


@pytest.mark.parametrize(
    "options, code, says",
    [
        (["--context", "9999"], 2, "a context of 9999 tokens is impossible (--context)"),
        (["--decode", "graph"], 2, "(--decode)"),
        (["--dtype", "float8"], 2, "(--dtype)"),
        (["--slots", "65537"], 2, "65537 slots are impossible (--slots)"),
        (["--gemv", "ours"], 2, "--gemv ours is for a GPU"),
        (["--host", ""], 2, "--host is empty"),
        (["--chat-template", "nowhere"], 1, "cannot be read: No such file or directory (nowhere)"),
        (["--model", "nowhere"], 1, "no folder or file 'nowhere'"),
        (["--api-key-file", "nowhere"], 1, "cannot be read"),
        (["--port", "TAKEN"], 1, "cannot be used"),
        (["--host", "192.0.2.1"], 1, "cannot be used"),
    ],
)
def test_what_keeps_a_server_from_starting(served, options, code, says):
    options = [str(served.port) if option == "TAKEN" else option for option in options]
    ended = cli("serve", "--device", "cpu", "--port", "0", *options)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert says in ended.stderr and "Traceback" not in ended.stderr


def test_metrics_have_the_names_and_forms_of_prometheus(served):
    served.complete(prompt=PROMPT, max_tokens=3)
    text = served.ask("GET", "/metrics")[2].decode()
    assert "# TYPE vllm:time_to_first_token_seconds histogram" in text
    assert "# TYPE vllm:generation_tokens_total counter" in text
    assert served.metric("vllm:generation_tokens_total") >= 3
    served.check_all_answered()  # a request is counted a moment after its answer was sent
    count = served.metric("vllm:e2e_request_latency_seconds_count")
    assert count == served.metric("vllm:e2e_request_latency_seconds_bucket", 'le="+Inf"')
    done = [served.metric("vllm:request_success_total", r) for r in ("stop", "length")]
    assert sum(done) >= count > 0


def test_a_chat_needs_a_template(served):
    body = {"messages": [{"role": "user", "content": "hello"}]}
    status, _, data = served.ask("POST", "/v1/chat/completions", body)
    assert status == 400 and "--chat-template" in json.loads(data)["error"]["message"]


def test_a_chat_with_a_template_and_keys(tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )
    keys = tmp_path / "keys"
    keys.write_text("# ours\nsecret\nother\n")
    body = {
        "messages": [
            {"role": "system", "content": "Speak."},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        "max_tokens": 6,
        "temperature": 0,
        "logprobs": True,
        "top_logprobs": 2,
    }
    options = ("--chat-template", str(template), "--api-key-file", str(keys), "--slots", "2")
    with Served(*options) as server:
        path, good = "/v1/chat/completions", {"authorization": "Bearer other"}
        for wrong in ({}, {"authorization": "Bearer wrong"}, {"authorization": "other"}):
            status, _, data = server.ask("POST", path, body, wrong)
            assert status == 401
            assert json.loads(data)["error"]["code"] == "invalid_api_key"
        assert server.ask("GET", "/v1/models")[0] == 401
        assert server.ask("GET", "/health")[0] == 200
        status, _, data = server.ask("POST", path, body, good)
        choice = json.loads(data)["choices"][0]
        assert status == 200 and choice["message"]["role"] == "assistant"
        assert len(choice["logprobs"]["content"][0]["top_logprobs"]) == 2
        plain = {"prompt": "SYSTEM: Speak.\nUSER: hello\nASSISTANT:", "max_tokens": 6}
        status, _, data = server.ask("POST", "/v1/completions", plain | {"temperature": 0}, good)
        assert json.loads(data)["choices"][0]["text"] == choice["message"]["content"]
        status, _, data = server.ask("POST", path, body | {"stream": True}, good)
        events = events_of(data)
        deltas = [event["choices"][0]["delta"] for event in events]
        assert deltas[0] == {"role": "assistant", "content": ""}
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == choice["message"]["content"]
        assert server.ask("POST", path, {"messages": "x"}, good)[0] == 400


def test_prompts_are_in_the_log_only_where_that_is_asked(tmp_path):
    for option, shown in (((), False), (("--log-prompts",), True)):
        with Served("--slots", "1", *option) as server:
            server.complete(prompt="a very private text", max_tokens=1)
            server.check_all_answered()
            assert ("a very private text" in server.log()) is shown
            assert '"prompt_tokens":' in server.log()
