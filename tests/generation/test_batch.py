"""Batch files: answers, errors in their lines, and what a kill leaves."""

from __future__ import annotations

import json
import os
import random
import signal
import time
import tracemalloc
from unittest.mock import Mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_lm import DEVICES, small_lm

from gpt2cupy.errors import InputError
from gpt2cupy.generation.batch import Batch
from gpt2cupy.generation.batch_file import BatchInput, BatchOutput


@pytest.fixture(scope="module", params=DEVICES)
def lm(request, tmp_path_factory):
    with small_lm(tmp_path_factory.mktemp("small"), request.param) as lm:
        yield lm


def line(custom_id, **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def written(folder, lines, name="in.jsonl"):
    """A file of requests; strings and bytes are written as they are."""
    texts = [each if isinstance(each, str | bytes) else json.dumps(each) for each in lines]
    path = folder / name
    data = [text.encode() if isinstance(text, str) else text for text in texts]
    path.write_bytes(b"".join(line + b"\n" for line in data))
    return path


def read(path):
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]


def by_id(path):
    found = read(path)
    names = [each["custom_id"] for each in found]
    assert len(set(names)) == len(names), "a request was answered twice"
    return {each["custom_id"]: each for each in found}


def texts(path):
    """What does not depend on the clock."""
    return {
        name: (each["error"], each["response"]["body"].get("choices"))
        for name, each in by_id(path).items()
    }


def several(count, **body):
    return [
        line(f"r{i}", prompt=f"ROMEO {i}", max_tokens=1 + i % 7, seed=i, **body)
        for i in range(count)
    ]


def test_answers_are_what_generate_gives(lm, tmp_path):
    bodies = {
        "plain": {"prompt": "a b", "max_tokens": 5, "temperature": 0},
        "ids": {"prompt": [5, 6, 7], "max_tokens": 5, "temperature": 0},
        "two": {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "seed": 1},
        "stop": {"prompt": "aa", "max_tokens": 30, "seed": 2, "stop": ["e", "t"]},
        "none": {"prompt": "a", "max_tokens": 0},
    }
    path, out = written(tmp_path, [line(k, **v) for k, v in bodies.items()]), tmp_path / "out"
    summary = lm.batch(path, out)
    found = by_id(out)
    assert (summary.requests, summary.before, summary.failed) == (5, 0, 0)
    for name, body in bodies.items():
        answer = found[name]["response"]
        assert answer["status_code"] == 200 and found[name]["error"] is None
        own = {"temperature": 1.0, **body}
        own["max_new_tokens"] = own.pop("max_tokens")
        done = lm.generate(own.pop("prompt"), **own)
        flat = [c for group in (done if isinstance(done, list) else [done])
                for c in (group if isinstance(group, list) else [group])]  # fmt: skip
        assert [c["text"] for c in answer["body"]["choices"]] == [c.text for c in flat]
    assert summary.completion_tokens == sum(
        each["response"]["body"]["usage"]["completion_tokens"] for each in found.values()
    )


def test_logprobs_and_echo(lm, tmp_path):
    body = {"prompt": "ROMEO", "max_tokens": 3, "temperature": 0, "logprobs": 4, "echo": True}
    path = written(tmp_path, [line("a", **body), line("b", **body | {"max_tokens": 0})])
    lm.batch(path, tmp_path / "out")
    found = by_id(tmp_path / "out")
    done = lm.generate("ROMEO", max_new_tokens=3, logprobs=4)
    score = lm.score("ROMEO", bos=False)
    for name, own in (("a", done.logprobs), ("b", [])):
        (choice,) = found[name]["response"]["body"]["choices"]
        logprobs = choice["logprobs"]["token_logprobs"]
        assert logprobs[0] is None
        expected = [*score.logprobs.tolist(), *own]
        assert logprobs[1:] == [pytest.approx(value, abs=2e-5) for value in expected]
        top = choice["logprobs"]["top_logprobs"]
        assert top[0] is None and all(4 <= len(each) <= 5 for each in top[1:])
        assert choice["text"] == "ROMEO" + (done.text if own else "")


@pytest.mark.parametrize(
    ("bad", "code", "says"),
    [
        ("garbage", "invalid_request", "no JSON: Expecting value at column 1 (line 3)"),
        ('{"custom_id": "x"', "invalid_request", "no JSON"),
        ("[" * 100_000, "invalid_request", "no JSON"),
        (b"\xff\xfe\x00", "invalid_request", "byte 0 is not UTF-8 (line 3)"),
        ("[1]", "invalid_request", "the line is a list, not an object (line 3)"),
        ({"method": "POST"}, "invalid_request", "there is no custom_id (line 3)"),
        (
            line("") | {"custom_id": 3},
            "invalid_request",
            "the custom_id is 3, an int, not a string (line 3)",
        ),
        (line(""), "invalid_request", "the custom_id is empty (line 3)"),
        (line("x") | {"method": "GET"}, "invalid_request", "POST"),
        (line("x") | {"url": "/v1/chat/completions"}, "invalid_request", "/v1/completions"),
        (line("x") | {"body": None}, "invalid_request", "body"),
        (line("x", prompt="a", best_of=3), "invalid_request", "best_of"),
        (line("x", prompt="a", stream=True), "invalid_request", "streamed"),
        (line("x", prompt=[10**6]), "invalid_request", "vocabulary"),
        (line("x", prompt="a", max_tokens=10**4), "invalid_request", "max_tokens"),
        (line("x", prompt="a", temperature=-1), "invalid_request", "temperature"),
    ],
)
def test_a_request_that_cannot_be_is_an_error_in_its_line(lm, tmp_path, bad, code, says):
    path = written(tmp_path, [line("a", prompt="a"), "", bad, line("b", prompt="b")])
    summary = lm.batch(path, tmp_path / "out", max_batch=1)
    found = read(tmp_path / "out")
    assert summary.failed == 1 and len(found) == 3
    (failed,) = [each for each in found if each["error"]]
    assert failed["id"] == "batch_req_1"
    assert failed["error"]["code"] == code and says in failed["error"]["message"]
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["type"] == "invalid_request_error"
    before = (tmp_path / "out").read_bytes()
    assert lm.batch(path, tmp_path / "out").before == 3  # nothing is left to do
    assert (tmp_path / "out").read_bytes() == before


def test_fields_without_a_meaning_are_named(lm, tmp_path):
    path = written(tmp_path, [line("a", prompt="a", zebra=1), line("b", prompt="a", user="me")])
    assert lm.batch(path, tmp_path / "out").ignored == {"zebra"}


def test_files_that_are_none_are_refused_at_once(lm, tmp_path):
    path = written(tmp_path, several(1))
    os.mkfifo(tmp_path / "pipe")
    for wrong in (tmp_path / "pipe", tmp_path, "/dev/null", "/dev/full"):
        with pytest.raises(InputError, match=r"plain file|directory"):
            lm.batch(wrong, tmp_path / "out")
        with pytest.raises(InputError, match="no plain file"):
            lm.batch(path, wrong)
    assert not (tmp_path / "out").exists()


def test_a_file_that_shrinks_is_not_taken_as_answered(lm, tmp_path):
    path = written(tmp_path, several(40))
    requests = BatchInput(path)
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    with BatchOutput(tmp_path / "out", requests, lm.name) as answers:
        batch = Batch(lm._session, lm._encoder, lm.name, requests, answers, 2)
        with pytest.raises(InputError, match="has lost lines"):
            batch.run()
    assert len(by_id(tmp_path / "out")) == 3


def test_a_batch_that_ends_early_closes_the_file_of_requests(lm, tmp_path, monkeypatch):
    opened, own = [], BatchInput.lines

    def lines(self):
        opened.append(own(self))
        return opened[-1]

    requests = BatchInput(written(tmp_path, several(40)))
    monkeypatch.setattr(BatchInput, "lines", lines)
    with BatchOutput(tmp_path / "out", requests, lm.name) as answers:
        batch = Batch(lm._session, lm._encoder, lm.name, requests, answers, 2)
        with pytest.raises(KeyboardInterrupt) as caught:  # its traceback keeps the frames
            batch.run(Mock(side_effect=KeyboardInterrupt))
    assert caught.tb and len(opened) == 1 and opened[0].gi_frame is None


def test_another_model_is_named_as_what_means_nothing(lm, tmp_path):
    path = written(tmp_path, [line("a", model=lm.name), line("b", model="gpt-5")])
    assert lm.batch(path, tmp_path / "out").ignored == {"model"}
    path = written(tmp_path, [line("a", model=lm.name)])
    assert not lm.batch(path, tmp_path / "other").ignored


def test_two_requests_of_one_name_are_refused_before_anything_runs(lm, tmp_path):
    lines = [*several(20), line("twice", prompt="a"), *[""] * 3, line("twice", prompt="b")]
    with pytest.raises(InputError, match="lines 21 and 25 both have the custom_id 'twice'"):
        lm.batch(written(tmp_path, lines), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_empty_file_has_no_answers(lm, tmp_path):
    assert lm.batch(written(tmp_path, ["", " "]), tmp_path / "out").requests == 0
    assert (tmp_path / "out").read_bytes() == b""


def test_what_files_cannot_be(lm, tmp_path):
    path = written(tmp_path, several(3))
    with pytest.raises(InputError, match="cannot be read"):
        lm.batch(tmp_path / "missing", tmp_path / "out")
    with pytest.raises(InputError, match="one file"):
        lm.batch(path, path)
    with pytest.raises(Exception, match="cannot be written"):
        lm.batch(path, tmp_path / "no" / "folder")
    for other in ("text\n", '{"id": "batch_req_0"}\n', json.dumps(line("r0")) + "\n"):
        (tmp_path / "out").write_text(other)
        with pytest.raises(InputError, match="holds some of other requests"):
            lm.batch(path, tmp_path / "out")
        assert (tmp_path / "out").read_text() == other
    (tmp_path / "out").unlink()
    lm.batch(path, tmp_path / "out")
    with pytest.raises(InputError, match="of other requests"):
        lm.batch(written(tmp_path, several(3)[::-1], "other"), tmp_path / "out")
    answers = (tmp_path / "out").read_text()
    (tmp_path / "out").write_text(answers.replace(json.dumps(lm.name), '"another"'))
    with pytest.raises(InputError, match="of the model 'another'"):
        lm.batch(path, tmp_path / "out")


def test_two_processes_do_not_write_one_file(lm, tmp_path):
    path = written(tmp_path, several(3))
    with (
        BatchOutput(tmp_path / "out", BatchInput(path), lm.name),
        pytest.raises(InputError, match="another process"),
    ):
        lm.batch(path, tmp_path / "out")
    assert lm.batch(path, tmp_path / "out").before == 0


def test_a_byte_order_mark_is_no_part_of_the_first_line(lm, tmp_path):
    path = tmp_path / "in"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(line("a", prompt="a")).encode())
    assert lm.batch(path, tmp_path / "out").failed == 0


# -- what a kill leaves ---------------------------------------------------------------------------

REQUESTS = several(40, temperature=0.9, logprobs=1)
REQUESTS[7]["body"]["best_of"] = 2
REQUESTS[11] = line("r11", prompt=["a", "b"], n=2, max_tokens=3, seed=5)


@pytest.fixture(scope="module")
def whole(lm, tmp_path_factory):
    """The file of requests, the answers of a run that nothing disturbs, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    path = written(folder, REQUESTS)
    lm.batch(path, folder / "out", max_batch=4)
    start = time.perf_counter()
    lm.batch(path, folder / "again", max_batch=4)
    return path, folder / "out", time.perf_counter() - start


def check_same(found, expected):
    """The same answers; log-probabilities may differ in their last digits."""
    one, other = texts(found), texts(expected)
    assert one.keys() == other.keys() == {each["custom_id"] for each in REQUESTS}
    for name in one:
        assert one[name][0] == other[name][0]
        pairs = zip(one[name][1] or (), other[name][1] or (), strict=True)
        assert all(a["text"] == b["text"] and a["index"] == b["index"] for a, b in pairs)


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_file_cut_anywhere_is_gone_on_with(lm, whole, tmp_path_factory, data):
    """As a loss of power may leave it: some lines, and the beginning of one more."""
    path, complete, _ = whole
    answers = complete.read_bytes()
    cut = data.draw(st.integers(0, len(answers)))
    out = tmp_path_factory.mktemp("cut") / "out"
    out.write_bytes(answers[:cut])
    kept = answers[: answers.rfind(b"\n", 0, cut) + 1]
    assert lm.batch(path, out, max_batch=8).before == kept.count(b"\n")
    assert out.read_bytes().startswith(kept), "what was answered is left as it was"
    check_same(out, complete)


def test_zeros_that_a_loss_of_power_left_are_dropped(lm, whole, tmp_path):
    path, complete, _ = whole
    lines = complete.read_bytes().splitlines(keepends=True)
    (tmp_path / "out").write_bytes(b"".join([*lines[:5], b"\0" * 700, *lines[6:9]]))
    assert lm.batch(path, tmp_path / "out").before == 5
    check_same(tmp_path / "out", complete)


def killed_after(seconds, run):
    """Fork, run in the child, and kill it after so long; returns whether that came too late."""
    pid = os.fork()
    if not pid:
        try:
            run()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return not os.WIFSIGNALED(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_kills_at_random_points_lose_and_repeat_nothing(lm, whole, tmp_path, request):
    if lm.device != "cpu":
        pytest.skip("CUDA is not in a child")
    path, complete, seconds = whole
    wanted = request.config.getoption("--kills")
    rng, out, kills, complete_runs = random.Random(7), tmp_path / "out", 0, 0
    while kills < wanted:
        late = killed_after(
            rng.uniform(0, seconds / 2), lambda: lm.batch(path, out, max_batch=4, progress=False)
        )
        kills += not late
        if late:
            check_same(out, complete)
            out.unlink()
            complete_runs += 1
        assert complete_runs < 5 * wanted, "runs end before they are killed"
    lm.batch(path, out)
    check_same(out, complete)


def test_memory_does_not_grow_with_the_file(lm, tmp_path):
    if lm.device != "cpu":
        pytest.skip("the same code as on the CPU")

    def most(count):
        path = written(tmp_path, [line(f"r{i}", prompt="a", max_tokens=1) for i in range(count)])
        tracemalloc.start()
        lm.batch(path, tmp_path / f"out{count}", max_batch=4)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    most(10)
    assert most(300) < 1.3 * most(100) + 300 * 9
