"""agenerate and astream: many tasks in one engine, cancellation, errors, other calls beside."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading

import numpy as np
import pytest
from small_lm import DEVICES, small_lm

from gpt2cupy import SamplingParams
from gpt2cupy.errors import BusyError, ClosedError, InputError, NonFiniteError

SHORT = {"max_new_tokens": 6, "temperature": 0.8, "seed": 3, "eos_token_id": -1}
LONG = {"max_new_tokens": 120, "eos_token_id": -1}


@pytest.fixture(scope="module", params=DEVICES)
def lm(request, tmp_path_factory):
    with small_lm(tmp_path_factory.mktemp("small"), request.param) as lm:
        yield lm


def run(coroutine):
    """With a limit of time: a call that is never answered would hang."""
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def texts(found):
    return [(each.text, each.tokens, each.finish_reason) for each in found]


async def read(stream):
    return [piece async for piece in stream]


def idle(lm):
    """Wait for the owner's thread to end."""
    while (thread := lm._owner._thread) is not None:
        thread.join(5)


def test_calls_give_what_generate_and_stream_give(lm):
    async def calls():
        return (
            await lm.agenerate("a", **SHORT),
            await lm.agenerate(["a", "b", [5, 6]], max_batch=2, **SHORT),
            await lm.agenerate("a", n=2, **SHORT),
            await lm.agenerate(["a", "b"], [SamplingParams(n=2), SamplingParams()], **SHORT),
            await lm.agenerate(["a", "b"], max_new_tokens=0),
            await read(lm.astream("a", **SHORT)),
            await read(lm.astream(["a", "b"], **SHORT)),
            await read(lm.astream("a", max_new_tokens=0)),
            await lm.agenerate([]),
        )

    one, three, two, own, nothing, pieces, pairs, none, empty = run(calls())
    assert texts([one]) == texts([lm.generate("a", **SHORT)])
    assert texts(three) == texts(lm.generate(["a", "b", [5, 6]], **SHORT))
    assert texts(two) == texts(lm.generate("a", n=2, **SHORT))
    assert texts(own[0]) == texts(two) and own[1].tokens
    assert [each.tokens for each in nothing] == [[], []] and none == empty == []
    assert "".join(piece.text for piece in pieces) == one.text
    assert pieces[-1].finish_reason == "length" and pieces[0].prefill_seconds > 0
    for number, text in enumerate("ab"):
        expected = lm.generate(text, **SHORT).tokens
        assert [piece.token for i, piece in pairs if i == number] == expected


def test_tasks_share_the_steps_of_one_engine(lm):
    async def calls():
        tasks = [lm.agenerate("a", **LONG | {"seed": i, "temperature": 1.0}) for i in range(8)]
        return await asyncio.gather(*tasks, read(lm.astream("b", **LONG)))

    *whole, pieces = run(calls())
    assert len(pieces) == 120 and all(len(each.tokens) == 120 for each in whole)
    assert len({each.text for each in whole}) == 8
    # More steps than one text takes, and far fewer than nine one after another.
    before = lm._session._engine.rows.steps
    run(calls())
    assert 119 <= lm._session._engine.rows.steps - before < 300


def test_a_task_that_is_cancelled_ends_its_requests_alone(lm):
    async def calls():
        other = asyncio.ensure_future(lm.agenerate("a", **SHORT | {"max_new_tokens": 60}))
        task = asyncio.ensure_future(lm.agenerate(["b"] * 3, **LONG))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await other, await lm.agenerate("c", **SHORT)

    long, short = run(calls())
    assert len(long.tokens) == 60 and len(short.tokens) == 6
    idle(lm)
    assert lm._owner._calls == {} and lm._session._engine.idle
    assert lm.generate("a", **SHORT).tokens


def test_a_stream_that_is_left_ends_its_request(lm):
    async def calls():
        async with contextlib.aclosing(lm.astream("a", **LONG)) as pieces:
            async for _ in pieces:
                break
        # Not closed by hand, it is when it is collected.
        async for _ in lm.astream("a", **LONG):
            break
        gc.collect()
        await asyncio.sleep(0)
        return await lm.agenerate("c", **SHORT)

    assert len(run(calls()).tokens) == 6
    idle(lm)
    assert lm._owner._calls == {}


def test_a_stop_string_ends_a_stream_and_a_call(lm):
    free = lm.generate("a", **LONG).text
    stop = free[10:12]

    async def calls():
        pieces = await read(lm.astream("a", stop=stop, **LONG))
        return pieces, await lm.agenerate("a", stop=stop, **LONG)

    pieces, whole = run(calls())
    assert "".join(piece.text for piece in pieces) == whole.text == free[: free.index(stop)]
    assert pieces[-1].finish_reason == whole.finish_reason == "stop"


def test_the_model_is_free_between_calls_and_waits_for_others(lm):
    async def calls():
        first = await lm.agenerate("a", **SHORT)
        loop = asyncio.get_running_loop()
        same = loop.run_in_executor(None, lambda: lm.generate("a", **SHORT))
        return [first, await lm.agenerate("a", **SHORT), await same]

    assert len({each.text for each in run(calls())}) == 1
    stream = lm.stream("a", **SHORT)
    next(stream)
    with pytest.raises(BusyError):  # it would wait for this thread, and this thread for it
        run(lm.agenerate("a"))
    thread = threading.Thread(target=lambda: next(stream))  # from now on it is that thread's
    thread.start()
    thread.join()

    async def waits():
        call = asyncio.ensure_future(lm.agenerate("a", **SHORT))
        await asyncio.sleep(0.02)
        assert not call.done()
        stream.close()
        return await call

    assert len(run(waits()).tokens) == 6


def test_arguments_are_checked_before_anything_waits(lm):
    for call in (lm.agenerate, lm.astream):
        for arguments, options, says in (
            ((5,), {}, "cannot be an int"),
            (("a",), {"top_p": 7}, "top_p"),
            (("a",), {"max_batch": 0}, "max_batch"),
            ((iter("a"),), {}, "iterator"),
        ):
            with pytest.raises(InputError, match=says):
                found = call(*arguments, **options)
                if call == lm.agenerate:
                    run(found)
    with pytest.raises(InputError, match="one continuation"):
        lm.astream("a", n=2)


def test_loops_of_several_threads_share_an_engine(lm):
    found = []

    def thread(number):
        found.append(run(lm.agenerate("a", **SHORT | {"seed": number})))

    threads = [threading.Thread(target=thread, args=[number]) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join(60)
    assert len({each.seed for each in found}) == 4


def test_a_text_without_finite_logits_fails_alone(tmp_path):
    with small_lm(tmp_path) as lm:
        lm.model.weights.wpe[8] = np.nan

        async def calls():
            good = {"max_new_tokens": 3, "eos_token_id": -1}
            tasks = [
                lm.agenerate("a", **good),
                lm.agenerate(["a", [1] * 20], **good),
                read(lm.astream([1] * 20, **good)),
                read(lm.astream("a", **good)),
            ]
            return await asyncio.gather(*tasks, return_exceptions=True)

        one, two, bad, fine = run(calls())
        assert len(one.tokens) == 3 and len(fine) == 3
        assert isinstance(two, NonFiniteError) and isinstance(bad, NonFiniteError)
        assert two.failed == ((1, 0),) and two.completions[0].tokens == one.tokens


def test_closing_ends_what_waits(tmp_path):
    with small_lm(tmp_path) as lm:

        async def calls():
            tasks = [asyncio.ensure_future(lm.agenerate("a", **LONG)) for _ in range(3)]
            tasks.append(asyncio.ensure_future(read(lm.astream("a", **LONG))))
            await asyncio.sleep(0.01)
            lm.close()
            return await asyncio.gather(*tasks, return_exceptions=True)

        assert all(isinstance(each, ClosedError) for each in run(calls()))
        with pytest.raises(ClosedError):
            run(lm.agenerate("a"))


def test_an_error_of_the_engine_is_one_of_every_call(tmp_path, monkeypatch):
    with small_lm(tmp_path) as lm:
        run(lm.agenerate("a", **SHORT))
        engine = lm._session._engine
        idle(lm)

        def broken():
            raise MemoryError("step")

        monkeypatch.setattr(engine, "step", broken)

        async def calls():
            return await asyncio.gather(
                lm.agenerate("a", **SHORT), lm.agenerate("b", **SHORT), return_exceptions=True
            )

        assert any(isinstance(each, MemoryError) for each in run(calls()))
        assert run(lm.agenerate("a", **SHORT)).tokens  # with a new engine


def test_a_warning_names_the_line_of_the_caller(lm):
    async def calls():
        await lm.agenerate("a", max_new_tokens=1, top_k=3)
        lm.astream("a", max_new_tokens=1, top_k=3)

    with pytest.warns(RuntimeWarning, match="top_k=3 does nothing") as seen:
        run(calls())
    assert [each.filename for each in seen] == [__file__] * 2
