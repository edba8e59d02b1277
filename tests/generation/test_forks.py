"""A child of a process whose threads generate, or that has a stream open, can go on by itself."""

from __future__ import annotations

import os
import pickle
import select
import signal
import threading
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from builders import TINY

from gpt2cupy import GPT2, LanguageModel
from gpt2cupy.errors import ClosedError, DeviceError, Gpt2CupyError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.sampling import SamplingParams

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
OPTIONS = {"max_new_tokens": 4, "eos_token_id": -1}


class Ids:
    """A tokenizer for prompts of ids."""

    ordinary_size, eot_token, specials = TINY.vocab_size, 0, {}

    def stream(self):
        return SimpleNamespace(push=lambda id_: f"{id_} ", flush=str)

    def decode(self, ids):
        return "".join(f"{id_} " for id_ in ids)


@pytest.fixture
def lm():
    with LanguageModel(GPT2.random(TINY, device="cpu"), Ids(), "tiny") as model:
        yield model


def in_child(call):
    """What a function returns or raises in a child; a child that hangs is killed."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        child = os.fork()
    if child == 0:
        try:
            found = call()
        except BaseException as error:
            found = error
        os.write(writer, pickle.dumps(found))
        os._exit(0)
    os.close(writer)
    try:
        if not select.select([reader], [], [], 30)[0]:
            os.kill(child, signal.SIGKILL)
            pytest.fail("the child hangs")
        return pickle.loads(os.read(reader, 1 << 20))
    finally:
        os.close(reader)
        os.waitpid(child, 0)


def test_while_a_stream_is_open(lm):
    expected = lm.generate([5, 9], **OPTIONS)
    scores = lm.score([5, 9, 7])
    stream = lm.stream([5, 9], **OPTIONS)
    tokens = [next(stream).token]

    def child():
        with pytest.raises(ClosedError, match="opened before the process was forked"):
            next(stream)
        mine = lm.stream([5, 9], **OPTIONS)
        first = next(mine).token
        stream.close()  # the parent's: this one keeps its turn
        with pytest.raises(Gpt2CupyError, match="still open in this thread"):
            lm.score([5, 9, 7])
        mine.close()
        return first, lm.generate([5, 9], **OPTIONS), lm.score([5, 9, 7])

    assert in_child(child) == (expected.tokens[0], expected, scores)
    tokens += [piece.token for piece in stream]
    assert tokens == expected.tokens, "the parent's stream is as it was"


def test_while_a_thread_generates(lm):
    expected = lm.generate([5, 9], **OPTIONS)
    reached, go_on = threading.Event(), threading.Event()
    decoder = lm._session._engine.decoder
    step = decoder.step

    def slow(state):
        reached.set()
        assert go_on.wait(30)
        step(state)

    decoder.step = slow
    thread = threading.Thread(target=lambda: lm.generate([7], **OPTIONS), daemon=True)
    thread.start()
    assert reached.wait(30)
    try:
        assert in_child(lambda: (lm.generate([5, 9], **OPTIONS), lm.close())) == (expected, None)
    finally:
        go_on.set()
        thread.join(30)
    decoder.step = step
    assert lm.generate([5, 9], **OPTIONS) == expected


def test_an_engine_in_the_middle_of_a_run():
    model = GPT2.random(TINY, device="cpu")
    engine = Engine(model, 2)
    params = SamplingParams(max_new_tokens=5)

    def run():
        return engine.run([Request(i, np.array([5 + i], np.int32), params) for i in range(3)])

    expected = [(token.key, token.id) for token in run()]
    running = run()
    first = next(running)

    def child():
        with pytest.raises(ClosedError, match="before the process was forked"):
            next(running)
        return [(token.key, token.id) for token in run()]

    assert in_child(child) == expected
    assert [(t.key, t.id) for t in (first, *running)] == expected


def test_on_a_gpu_the_child_is_told(lm):
    lm.generate([5, 9], **OPTIONS)
    stream = lm.stream([5, 9], **OPTIONS)
    next(stream)
    session = lm._session
    session.gpu = 0  # as if: what a child does must not reach CUDA

    def child():
        calls = (
            lambda: lm.generate([5], **OPTIONS),
            lambda: next(lm.stream([5], **OPTIONS)),
            lambda: next(stream),
            lambda: lm.score([5, 6]),
            lambda: lm([[5]]),
            lambda: lm.model,
        )
        said = set()
        for call in calls:
            with pytest.raises(DeviceError) as caught:
                call()
            said.add(str(caught.value))
        shown = repr(lm)
        lm.close()
        return said, shown, repr(lm)

    try:
        (said,), shown, closed = in_child(child)
    finally:
        session.gpu = None
    assert "forked from one that uses the GPU" in said and '"spawn"' in said
    assert (shown, closed) == (
        "<LanguageModel tiny, of the parent process>",
        "<LanguageModel tiny, closed>",
    )
    assert len(list(stream)) == 3


def test_an_engine_of_a_gpu_is_told_too(monkeypatch):
    engine = Engine(GPT2.random(TINY, device="cpu"), 1)
    request = Request(0, np.array([5], np.int32), SamplingParams(max_new_tokens=1))

    def child():
        monkeypatch.setattr(engine.model, "xp", None)
        with pytest.raises(DeviceError, match="forked"):
            next(engine.run([request]))

    assert in_child(child) is None


@pytest.mark.gpu
def test_a_child_of_a_process_with_a_gpu():
    with LanguageModel(GPT2.random(TINY, device="cuda"), Ids(), "tiny") as lm:
        expected = lm.generate([5, 9], **OPTIONS)
        stream = lm.stream([5, 9], **OPTIONS)
        tokens = [next(stream).token]

        def child():
            for call in (
                lambda: lm.generate([5], **OPTIONS),
                lambda: next(stream),
                lambda: lm.score([5, 6]),
            ):
                with pytest.raises(DeviceError, match="forked from one that uses the GPU"):
                    call()
            lm.close()
            return repr(lm)

        assert in_child(child) == "<LanguageModel tiny, closed>"
        tokens += [piece.token for piece in stream]
        assert tokens == expected.tokens
        assert lm.generate([5, 9], **OPTIONS) == expected
