"""What a server must survive: its clients, its load, and the death of its processes."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import re
import signal
import time

import pytest
from server_process import (
    ENGINES,
    Served,
    closing_all,
    events_of,
    eventually,
    read_all,
    read_answer,
    request,
    text_of,
)

LONG = {"prompt": "ROMEO:", "max_tokens": 400, "ignore_eos": True, "temperature": 1}
SHORT = {"prompt": "ROMEO:", "max_tokens": 3, "temperature": 0}


def running(server: Served) -> float:
    return server.metric("vllm:num_requests_running")


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_vanishes_leaves_its_slot(served, stream):
    before = served.counts()["client_gone"]
    with closing_all([served.connect({**LONG, "stream": stream}) for _ in range(6)]) as sockets:
        if stream:
            seen = b""
            while b"data: " not in seen:  # the head may come alone
                seen += (part := sockets[0].recv(4096))
                assert part, seen
        eventually(lambda: running(served) == 4)
    # Two that waited for one of the four slots are gone as well.
    assert served.check_all_answered()["client_gone"] == before + 6
    assert served.complete(**SHORT)["usage"]["completion_tokens"] == 3


def test_a_client_that_never_reads_is_closed_and_holds_nobody_up(mocked):
    before = mocked.metric("gpt2cupy:slow_readers_closed_total")
    body = {"prompt": "a b c", "n": 100, "max_tokens": 500, "stream": True}
    with closing_all([mocked.connect(body, buffer=4096)]):
        start = time.monotonic()
        assert mocked.complete(prompt="a", max_tokens=20)["usage"]["completion_tokens"] == 20
        assert time.monotonic() - start < 2
        eventually(lambda: mocked.metric("gpt2cupy:slow_readers_closed_total") == before + 1, 15)
    mocked.check_all_answered()


def test_a_client_that_reads_a_byte_at_a_time_is_closed(mocked):
    before = mocked.metric("gpt2cupy:slow_readers_closed_total")
    body = {"prompt": "a b c", "n": 100, "max_tokens": 500, "stream": True}
    with closing_all([mocked.connect(body, buffer=4096)]) as (reader,):

        def closed() -> bool:
            reader.recv(1)
            return mocked.metric("gpt2cupy:slow_readers_closed_total") == before + 1

        eventually(closed, 15)
    mocked.check_all_answered()


def test_garbage_is_answered_or_closed(served):
    rng = random.Random(0)
    for size in (1, 50, 5000):
        with closing_all([served.connect()]) as (connection,):
            connection.sendall(rng.randbytes(size) + b"\r\n\r\n")
            answer = read_all(connection)
        assert not answer or answer.startswith(b"HTTP/1.1 400"), answer[:60]
    for text in (b"GET / HTTP/9.9\r\n\r\n", b"POST /v1/completions\r\n\r\n", b"\0" * 999):
        with closing_all([served.connect()]) as (connection,):
            connection.sendall(text)
            read_all(connection)
    assert served.complete(**SHORT)


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_that_is_too_large_is_refused(served, declared):
    head = b"POST /v1/completions HTTP/1.1\r\nhost: test\r\n"
    with closing_all([served.connect()]) as (connection,):
        if declared:
            connection.sendall(head + b"content-length: 100000000000\r\n\r\n")
        else:
            connection.sendall(head + b"transfer-encoding: chunked\r\n\r\n")
            for _ in range(8):
                connection.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", request({"prompt": "a" * 100})[:-50]])
def test_a_request_that_does_not_arrive_is_ended(served, sent):
    with closing_all([served.connect()]) as (connection,):
        connection.sendall(sent)
        start = time.monotonic()
        answer = read_all(connection)
        assert time.monotonic() - start < 6  # --receive-timeout is 1.5
        assert answer.startswith(b"HTTP/1.1 408")


def test_a_body_that_trickles_does_not_go_on_for_ever(served):
    data = request({"prompt": "a" * 100})
    with closing_all([served.connect()]) as (connection,):
        connection.sendall(data[:-60])
        start = time.monotonic()
        with pytest.raises(OSError):
            for place in range(len(data) - 60, len(data)):
                connection.sendall(data[place : place + 1])
                time.sleep(0.2)
        assert time.monotonic() - start < 8


def test_pipelined_requests_are_answered_in_their_order(served):
    with closing_all([served.connect()]) as (connection,):
        connection.sendall(b"".join(request({**SHORT, "max_tokens": n}) for n in (1, 2, 3)))
        seen = b""
        while seen.count(b'"total_tokens":') < 3:
            seen += connection.recv(4096)
    counts = [int(part.split(b"}")[0]) for part in seen.split(b'"total_tokens":')[1:]]
    assert counts == [3, 4, 5]


def test_requests_beyond_the_slots_wait_and_all_are_answered(mocked):
    """2,000 here; `make release-check` runs 10,000."""
    total = int(os.environ.get("GPT2CUPY_E2E_REQUESTS", "2000"))
    before = mocked.counts()
    body = request({"prompt": "a b c d", "max_tokens": 8})

    async def client(count: int) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", mocked.port)
        done = 0
        for _ in range(count):
            writer.write(body)
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 30)
            size = int(re.search(rb"content-length: (\d+)", head)[1])
            answer = json.loads(await reader.readexactly(size))
            done += head.startswith(b"HTTP/1.1 200") and answer["usage"]["completion_tokens"] == 8
        writer.close()
        return done

    async def clients() -> int:
        return sum(await asyncio.gather(*(client(total // 400) for _ in range(400))))

    assert asyncio.run(clients()) == total
    after = mocked.check_all_answered()
    assert after["completed"] - before["completed"] == total
    assert after["accepted"] - before["accepted"] == total


def test_more_than_may_wait_is_refused():
    with Served("--engine", "mock:50", "--slots", "1", "--max-waiting", "4") as server:
        body = {"prompt": "a", "max_tokens": 60}
        with closing_all([server.connect(body) for _ in range(12)]) as sockets:
            heads = [connection.recv(4096) for connection in sockets[6:]]
            assert any(head.startswith(b"HTTP/1.1 429") for head in heads)
            assert all(b"retry-after: 1" in head for head in heads if b" 429 " in head)


def test_a_request_that_takes_too_long_is_given_up():
    with Served("--engine", "mock:20", "--request-timeout", "0.5") as server:
        status, _, data = server.ask("POST", "/v1/completions", {"prompt": "a", "max_tokens": 99})
        assert status == 504 and json.loads(data)["error"]["code"] == "timeout"
        _, _, data = server.ask(
            "POST", "/v1/completions", {"prompt": "a", "max_tokens": 99, "stream": True}
        )
        assert events_of(data)[-1]["error"]["code"] == "timeout"
        assert server.check_all_answered()["error"] == 2


def test_a_request_that_fails_in_the_engine_fails_alone():
    with Served("--engine", f"{ENGINES}:failing", "--slots", "4") as server:
        bodies = [{**LONG, "max_tokens": count} for count in (20, 60, 30)]
        sockets = [server.connect(body) for body in bodies]
        with closing_all(sockets):
            first, failed, last = map(read_answer, sockets)
        assert first.startswith(b"HTTP/1.1 200") and last.startswith(b"HTTP/1.1 200")
        assert failed.startswith(b"HTTP/1.1 500") and b"non_finite_logits" in failed
        status, _, data = server.ask("POST", "/v1/completions", {**LONG, "stream": True})
        *tokens, error = events_of(data)
        assert status == 200 and len(text_of(tokens)) > 10
        assert error["error"]["code"] == "non_finite_logits"
        assert server.check_all_answered() == {
            "accepted": 4, "completed": 2, "error": 2, "client_gone": 0
        }  # fmt: skip


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_the_engine_process_ends_and_is_started_again(how):
    options = ("--engine", f"{ENGINES}:breaking") if how == "raises" else ()
    with Served("--slots", "2", *options) as server:
        whole = [server.connect(LONG) for _ in range(3)]
        stream = server.connect({**LONG, "stream": True})
        with closing_all(whole), closing_all([stream]):
            eventually(lambda: running(server) == 2)
            (engine,) = server.processes("engine")
            if how == "killed":
                os.kill(engine, signal.SIGKILL)
            else:
                whole.append(server.connect({**SHORT, "seed": 666}))
            for connection in whole:
                answer = b""
                while b'"code"' not in answer:  # head and body may come apart
                    answer += (part := connection.recv(4096))
                    assert part
                assert answer[9:12] in (b"503", b"500")
                assert re.search(rb'"code":"(unavailable|server_error)"', answer)
            answer = b""
            while b'"error"' not in answer:
                answer += stream.recv(4096)
        eventually(lambda: server.processes("engine") not in ([], [engine]), 20)
        eventually(lambda: server.get("/ready")["ready"], 20)
        assert server.metric("gpt2cupy:engine_restarts_total") == 1
        assert server.metric("gpt2cupy:engine_up") == 1
        assert server.complete(**SHORT)
        found = server.check_all_answered()
        assert found["error"] == len(whole) + 1 and found["client_gone"] == 0


def test_while_the_engine_is_away_the_server_says_so():
    options = ("--engine", f"{ENGINES}:slow_to_start", "--slots", "2")
    with Served(*options) as server:
        os.kill(server.processes("engine")[0], signal.SIGKILL)
        eventually(lambda: server.ask("GET", "/ready")[0] == 503)
        status, headers, data = server.ask("POST", "/v1/completions", SHORT)
        assert status == 503 and headers["retry-after"] == "1"
        assert json.loads(data)["error"]["code"] == "not_ready"
        assert server.ask("GET", "/health")[0] == 200
        assert server.metric("gpt2cupy:engine_up") == 0
        eventually(lambda: server.ask("GET", "/ready")[0] == 200, 20)


def test_a_front_process_that_is_killed_is_replaced():
    with Served("--slots", "4", "--workers", "2") as server:
        with closing_all([server.connect({**LONG, "stream": True}) for _ in range(8)]) as sockets:
            for connection in sockets:
                connection.recv(1024) if connection in sockets[:1] else None
            eventually(lambda: running(server) == 4)
            os.kill(server.processes("front")[0], signal.SIGKILL)
            eventually(lambda: server.metric("gpt2cupy:front_restarts_total") == 1)
            eventually(lambda: len(server.processes("front")) == 2)
            ends = [read_all(c)[-14:] for c in sockets if not c.recv(1 << 20)]
            assert len(ends) < len(sockets)
        # What the dead front had asked for leaves its slots.
        eventually(lambda: running(server) == 0, 10)
        for _ in range(8):
            assert server.complete(**SHORT)


def test_sigterm_answers_what_was_accepted_and_takes_no_more():
    with Served("--slots", "2") as server:
        with closing_all([server.connect({**LONG, "max_tokens": 60}) for _ in range(6)]) as sockets:
            stream = server.connect({**LONG, "stream": True, "max_tokens": 60})
            idle = server.connect()
            eventually(lambda: server.counts()["accepted"] == 7)
            server.process.send_signal(signal.SIGTERM)
            eventually(lambda: "no new requests" in server.log())
            with pytest.raises(OSError):
                for _ in range(100):
                    server.connect().close()
                    time.sleep(0.02)
            for connection in sockets:
                answer = read_all(connection)
                assert answer.startswith(b"HTTP/1.1 200") and b'"completion_tokens":60' in answer
            assert b"data: [DONE]" in read_all(stream)
            assert read_all(idle) == b""
            stream.close()
            idle.close()
        assert server.process.wait(10) == 0


def test_a_second_sigterm_ends_at_once():
    server = Served("--slots", "2", "--engine", "mock:5")
    with server, closing_all([server.connect({"prompt": "a", "max_tokens": 400})]):
        eventually(lambda: running(server) == 1)
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
        start = time.monotonic()
        server.process.wait(5)
        assert time.monotonic() - start < 2


def test_a_terminal_that_closes_ends_the_server_as_sigterm_does():
    with Served("--slots", "2", "--engine", "mock:1000") as server:
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(10) == 0 and "no new requests" in server.log()


def test_a_log_that_nobody_reads_holds_nobody_up():
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with Served("--engine", "mock:1000", log=writer) as server:
        while not server.port:  # the first line alone is read
            server.take_port(os.read(reader, 4096).decode())
        for _ in range(60):
            assert server.complete(prompt="a", max_tokens=2)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(10) == 0
    os.close(reader)
    os.close(writer)


def test_what_is_not_done_in_the_time_to_stop_gets_an_error():
    with Served("--slots", "2", "--engine", "mock:5", "--drain-timeout", "0.5") as server:
        with closing_all([server.connect({"prompt": "a", "max_tokens": 400})]) as (connection,):
            eventually(lambda: running(server) == 1)
            server.process.send_signal(signal.SIGTERM)
            assert connection.recv(4096).startswith(b"HTTP/1.1 503")
        assert server.process.wait(10) == 0


def test_processes_end_with_their_parent():
    with Served("--slots", "1") as server:
        children = server.processes("engine") + server.processes("front")
        server.process.kill()
        eventually(lambda: not any(os.path.exists(f"/proc/{pid}/stat") and alive(pid)
                                   for pid in children))  # fmt: skip


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_clock_that_jumps_changes_nothing(tmp_path):
    """time.time() goes an hour back or forth at every call, in all processes of the server."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "_real, _count = time.time, itertools.count()\n"
        "time.time = lambda: _real() + (3600 if next(_count) % 2 else -3600)\n"
    )
    options = ("--slots", "2", "--request-timeout", "20", "--receive-timeout", "10")
    with Served(*options, environment={"PYTHONPATH": str(tmp_path)}) as server:
        texts = {text_of(server.events(**SHORT)) for _ in range(10)}
        assert len(texts) == 1
        assert server.metric("vllm:e2e_request_latency_seconds_sum") < 10
        assert server.check_all_answered()["completed"] == 10


def test_a_port_in_use_is_an_error_with_a_remedy(served):
    with pytest.raises(AssertionError, match="cannot be used"):
        Served("--port", str(served.port)).__enter__()
