"""One model and its callers: threads, streams left open, closing, several models, pickling."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref

import pytest
from builders import TINY

import gpt2cupy
from gpt2cupy import GPT2
from gpt2cupy.errors import BusyError, ClosedError, Gpt2CupyError, InputError
from gpt2cupy.generation import continuations, scored_texts
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.session import Session
from gpt2cupy.weights import Weights

WAIT = 60  # seconds after which a thread counts as stuck
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def lm(device):
    with gpt2cupy.load("shakespeare", device=device) as model:
        yield model


class Caller(threading.Thread):
    """Calls a function and keeps what it returned or raised."""

    def __init__(self, call) -> None:
        super().__init__(daemon=True)
        self.call, self.result, self.error = call, None, None
        self.start()

    def run(self) -> None:
        try:
            self.result = self.call()
        except Gpt2CupyError as error:
            self.error = error

    def finished(self) -> Caller:
        self.join(WAIT)
        assert not self.is_alive(), "the thread is stuck"
        return self


# -- threads -------------------------------------------------------------------------------------


def test_threads_take_turns(lm):
    options = {"max_new_tokens": 12, "temperature": 0.9}
    prompts = ["ROMEO:", "JULIET:", "To be", "KING"]
    expected = [lm.generate(p, seed=i, **options) for i, p in enumerate(prompts)]
    scores = [lm.score(p * 4).logprobs.tolist() for p in prompts]

    def work(number, prompt):
        for _ in range(3):
            assert lm.score(prompt * 4).logprobs.tolist() == scores[number]
            done = lm.generate(prompt, seed=number, **options)
            text = "".join(p.text for p in lm.stream(prompt, seed=number, **options))
            assert text == done.text
        return done

    callers = [Caller(lambda i=i, p=p: work(i, p)) for i, p in enumerate(prompts)]
    assert [caller.finished().result for caller in callers] == expected


def test_another_thread_waits_for_an_open_stream(lm):
    expected = lm.generate("JULIET:", max_new_tokens=4)
    stream = lm.stream("ROMEO:", max_new_tokens=6)
    next(stream)
    waiting = Caller(lambda: lm.generate("JULIET:", max_new_tokens=4))
    waiting.join(0.3)
    assert waiting.is_alive()
    assert len(list(stream)) == 5
    assert waiting.finished().result == expected


def test_the_thread_that_holds_a_stream_is_told_so(lm):
    expected = lm.generate("ROMEO:", max_new_tokens=6).tokens
    first = lm.stream("ROMEO:", max_new_tokens=6)
    tokens = [next(first).token]
    for call in (
        lambda: next(lm.stream("JULIET:")),
        lambda: lm.generate("JULIET:"),
        lambda: lm.score("To be"),
        lambda: lm([[1]]),
    ):
        with pytest.raises(BusyError, match="still open in this thread") as caught:
            call()
        assert caught.value.where == "shakespeare" and "close()" in caught.value.remedy
    tokens += [piece.token for piece in first]
    assert tokens == expected, "the refused calls did not disturb the first"
    assert lm.generate("ROMEO:", max_new_tokens=6).tokens == expected


@pytest.mark.parametrize("options", [{}, {"stop": "\n"}, {"stop_token_ids": [198]}])
def test_the_last_piece_frees_the_model(lm, options):
    stream = lm.stream("ROMEO:", max_new_tokens=3, **options)
    text = ""
    for piece in stream:
        text += piece.text
        if piece.finish_reason:
            break
    done = lm.generate("ROMEO:", max_new_tokens=3, **options)
    assert (text, piece.finish_reason) == (done.text, done.finish_reason)
    assert list(stream) == []


def test_a_stream_may_be_read_by_several_threads_in_turn(lm):
    expected = lm.generate("ROMEO:", max_new_tokens=6)
    stream = lm.stream("ROMEO:", max_new_tokens=6)
    texts = [next(stream).text]

    def go_on():
        texts.append(next(stream).text)
        return lm.generate("ROMEO:")  # would wait for itself

    assert isinstance(Caller(go_on).finished().error, BusyError)
    texts += [piece.text for piece in stream]
    assert "".join(texts) == expected.text
    assert lm.generate("ROMEO:", max_new_tokens=6) == expected


def test_a_stream_outlives_the_thread_that_began_it(lm):
    """Another thread waits for it, also one that was given the number of the one that ended."""
    expected = lm.generate("ROMEO:", max_new_tokens=6).tokens
    stream = lm.stream("ROMEO:", max_new_tokens=6)
    first = Caller(lambda: next(stream).token).finished()
    tokens, number = [first.result], first.ident
    del first
    waiting = [Caller(lambda: lm.generate("ROMEO:", max_new_tokens=6).tokens) for _ in range(3)]
    if number not in [caller.ident for caller in waiting]:
        pytest.skip("no thread got that number")
    waiting[-1].join(0.3)
    assert all(caller.is_alive() for caller in waiting)
    assert tokens + [piece.token for piece in stream] == expected
    assert [caller.finished().result for caller in waiting] == [expected] * 3


def test_a_stream_left_early_frees_the_model(lm):
    expected = lm.generate("ROMEO:", max_new_tokens=6)
    stream = lm.stream("JULIET:", max_new_tokens=50)
    next(stream)
    stream.close()
    assert lm.generate("ROMEO:", max_new_tokens=6) == expected
    for _ in lm.stream("JULIET:", max_new_tokens=50):
        break
    assert lm.generate("ROMEO:", max_new_tokens=6) == expected


READERS = [
    (continuations, "pieces", lambda lm: lm.stream("JULIET:", max_new_tokens=50)),
    (continuations, "pieces", lambda lm: lm.stream(["JULIET:", "To be"], max_new_tokens=50)),
    (continuations, "completions", lambda lm: lm.generate(iter(["a", "b"]), max_new_tokens=2)),
    (scored_texts, "_scores", lambda lm: lm.score(iter(["To be", "ROMEO:"]))),
]


@pytest.mark.parametrize(("module", "name", "call"), READERS)
def test_a_stream_left_early_closes_what_it_reads(lm, module, name, call, monkeypatch):
    """By name: in Python 3.12.3 a generator that is closed may keep its frame and all in it."""
    expected = lm.generate("ROMEO:", max_new_tokens=6)
    kept, function = [], getattr(module, name)

    def noted(*args):
        kept.append(function(*args))
        return kept[-1]

    monkeypatch.setattr(module, name, noted)
    left = call(lm)
    next(left)
    left.close()
    monkeypatch.undo()
    assert len(kept) == 1 and kept[0].gi_frame is None
    assert lm.generate("ROMEO:", max_new_tokens=6) == expected


class Interrupted(BaseException):
    """As Ctrl-C would be."""


def test_a_step_that_failed_half_way_leaves_no_trace(lm):
    expected = lm.generate(["ROMEO:", "KING"], max_new_tokens=6)
    decoder = lm._session._engine.decoder
    step = decoder.step

    def fail_once(state):
        decoder.step = step
        step(state)
        raise Interrupted

    decoder.step = fail_once
    with pytest.raises(Interrupted):
        lm.generate(["ROMEO:", "KING"], max_new_tokens=6)
    assert lm.generate(["ROMEO:", "KING"], max_new_tokens=6) == expected


def test_two_models_in_two_threads(device):
    names = ["ROMEO:", "JULIET:"]
    options = {"max_new_tokens": 40, "temperature": 0.9, "seed": 3}
    with gpt2cupy.load(device=device) as one, gpt2cupy.load(device=device) as other:
        both = list(zip((one, other), names, strict=True))
        expected = [model.generate(name, **options) for model, name in both]
        barrier = threading.Barrier(2)

        def work(model, name):
            barrier.wait(WAIT)
            return [model.generate(name, **options) for _ in range(3)]

        callers = [Caller(lambda m=m, n=n: work(m, n)) for m, n in both]
        assert [caller.finished().result for caller in callers] == [[e] * 3 for e in expected]


def test_streams_of_two_models_side_by_side(device):
    options = {"max_new_tokens": 20, "temperature": 0.9, "seed": 3}
    with gpt2cupy.load(device=device) as one, gpt2cupy.load(device=device) as other:
        expected = [m.generate(n, **options).text for m, n in ((one, "ROMEO:"), (other, "KING"))]
        pairs = zip(one.stream("ROMEO:", **options), other.stream("KING", **options), strict=True)
        texts = [[piece.text for piece in pair] for pair in pairs]
        assert ["".join(column) for column in zip(*texts, strict=True)] == expected
        one.close()
        assert other.generate("KING", **options).text == expected[1]


# -- closing -------------------------------------------------------------------------------------


def test_a_closed_model_says_so(device):
    lm = gpt2cupy.load("shakespeare", device=device)
    lm.close()
    lm.close()
    for call in (
        lambda: lm.generate("a"),
        lambda: lm.generate("a", max_new_tokens=0),
        lambda: lm.stream("a"),
        lambda: lm.score("ab"),
        lambda: lm([[1]]),
        lambda: lm.device,
        lambda: lm.model,
    ):
        with pytest.raises(ClosedError, match="closed") as caught:
            call()
        assert caught.value.where == "shakespeare" and caught.value.remedy == "Load it again."
    assert "closed" in repr(lm)


def test_closing_frees_at_once(device):
    lm = gpt2cupy.load("shakespeare", device=device)
    stream = lm.stream("ROMEO:", max_new_tokens=6)
    next(stream)
    parts = [lm.model, lm.model.weights.wte, lm._session._engine, lm._session._engine.cache]
    alive = [weakref.ref(part) for part in parts]
    gc.disable()
    try:
        del parts
        lm.close()
        # Though the object and its open stream are still here.
        assert [ref() for ref in alive] == [None] * 4
    finally:
        gc.enable()
    with pytest.raises(ClosedError, match="closed"):
        next(stream)
    assert list(stream) == []


def test_closing_ends_a_call_of_another_thread(lm):
    lm.generate("ROMEO:", max_new_tokens=2)
    decoder = lm._session._engine.decoder
    step, inside, closed = decoder.step, threading.Event(), threading.Event()
    steps = []

    def pause(state):
        steps.append(inside.set())
        assert closed.wait(WAIT)
        step(state)

    decoder.step = pause
    caller = Caller(lambda: lm.generate("ROMEO:", max_new_tokens=200))
    assert inside.wait(WAIT)
    lm.close()
    closed.set()
    assert isinstance(caller.finished().error, ClosedError)
    assert len(steps) == 1, "it went on"


def test_closing_ends_those_who_wait(lm):
    """Though the stream that they wait for is never finished."""
    stream = lm.stream("ROMEO:", max_new_tokens=6)
    next(stream)
    calls = [lambda: lm.generate("KING"), lambda: lm.score("To be"), lambda: lm([[1]])]
    callers = [Caller(call) for call in calls * 2]
    callers[-1].join(0.3)
    assert all(caller.is_alive() for caller in callers)
    lm.close()
    assert all(isinstance(caller.finished().error, ClosedError) for caller in callers)
    for call in calls:
        with pytest.raises(ClosedError, match="closed"):
            call()
    with pytest.raises(ClosedError, match="closed"):
        next(stream)


def test_a_stream_closed_in_a_step_gives_no_token_more(lm):
    stream = lm.stream("ROMEO:", max_new_tokens=50)
    next(stream)
    decoder = lm._session._engine.decoder
    step = decoder.step

    def closed_meanwhile(state):
        step(state)
        Caller(lm.close).finished()

    decoder.step = closed_meanwhile
    with pytest.raises(ClosedError, match="closed"):
        next(stream)
    assert lm._session._running is None


def test_reading_while_another_thread_closes(lm):
    """A generator that one thread is ending cannot be resumed by another: Python's own error."""
    stream = lm.stream("ROMEO:", max_new_tokens=50)
    next(stream)
    ending, read = threading.Event(), threading.Event()

    def slow(running):
        try:
            yield from running
        finally:
            ending.set()
            read.wait(0.3)

    lm._session._running = slow(lm._session._running)
    next(stream)
    closer = Caller(lm.close)
    assert ending.wait(WAIT)
    with pytest.raises(ClosedError, match="closed"):
        next(stream)
    read.set()
    assert closer.finished().error is None


def test_a_request_cancelled_while_the_model_closes(lm, monkeypatch):
    """As at a stop string, with close() of another thread between two looks at the engine."""
    seen = iter([lm._session._engine_for(1)])
    monkeypatch.setattr(Session, "_engine", property(lambda self: next(seen, None)), raising=False)
    lm._session.cancel("key")
    assert next(seen, None) is None


def test_an_engine_made_while_the_model_closes_is_freed(lm, monkeypatch):
    made = []

    class Late(Engine):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            made.append(weakref.ref(self))
            Caller(lm.close).finished()

    monkeypatch.setattr("gpt2cupy.generation.session.Engine", Late)
    stream = lm.stream("ROMEO:", max_new_tokens=6)
    with pytest.raises(ClosedError, match="closed"):
        next(stream)
    del stream
    gc.collect()
    assert len(made) == 1 and made[0]() is None


def test_one_sequence_does_not_pay_for_rows_of_many(lm):
    lm.generate("ROMEO:", max_new_tokens=2)
    single = lm._session._engine
    assert single.slots == 1
    lm.generate(["ROMEO:", "KING"], max_new_tokens=2)
    assert lm._session._engine.slots == 2
    lm.generate(["ROMEO:"] * 5, max_new_tokens=2)
    many = lm._session._engine
    assert many.slots == 5
    next(lm.stream("ROMEO:"))
    assert lm._session._engine is single
    lm.generate(["ROMEO:"] * 3, max_new_tokens=2)
    assert lm._session._engine is many


@pytest.mark.gpu
@pytest.mark.skipif("PYTEST_XDIST_WORKER" in os.environ, reason="other tests share the GPU")
def test_closing_gives_memory_back_to_the_gpu():
    import cupy

    def free() -> int:
        return cupy.cuda.runtime.memGetInfo()[0]

    def use() -> int:
        with gpt2cupy.load(device="cuda") as lm:
            lm.generate(["ROMEO:"] * 4, max_new_tokens=5)
            lm.score("To be, or not to be")
            return free()

    use()  # what stays for the process: kernels, cuBLAS
    before = free()
    slack = 4 << 20  # the driver takes memory in blocks of its own
    for _ in range(3):
        assert use() < before - 2 * slack
        assert free() >= before - slack


# -- other processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("copying", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_language_model_is_not_pickled(lm, copying):
    with pytest.raises(InputError, match="a LanguageModel is not pickled") as caught:
        copying(lm)
    assert caught.value.where == "shakespeare" and "load" in caught.value.remedy


def test_a_gpt2_is_not_pickled():
    for part in (GPT2.random(TINY, device="cpu"), Weights.random(TINY, 0)):
        with pytest.raises(InputError, match="a GPT2 and its weights are not pickled") as caught:
            pickle.dumps(part)
        assert caught.value.where and "in the other process" in caught.value.remedy
    assert pickle.loads(pickle.dumps(TINY)) == TINY


def test_an_engine_is_made_anew_for_another_backend(lm):
    """Its decoder was chosen for the backend that the model had."""
    first = lm.generate("ROMEO:", max_new_tokens=4)
    engine = lm._session._engine_for(1)
    assert lm._session._engine_for(1) is engine
    lm.model.gemv = "cublas"
    assert lm._session._engine_for(1) is not engine
    assert lm.generate("ROMEO:", max_new_tokens=4).text == first.text
