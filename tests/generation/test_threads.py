"""A bare GPT2, engines and products in several threads: the same bits, or a clear error."""

from __future__ import annotations

import contextlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from builders import TINY, host, model_on

from gpt2cupy import SamplingParams
from gpt2cupy.errors import BusyError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.ops.core import blas, blas_device, blas_product
from gpt2cupy.weights import Weights

THREADS = 4
WAIT = 60  # seconds after which a thread counts as stuck


def at_once(work):
    """What ``work(number)`` gives in threads that begin together."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait(WAIT)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS), timeout=WAIT))


def ids_of(number):
    """More than 16 rows: products of tens of rows or, on older chips, of the library."""
    return np.random.default_rng(number).integers(0, TINY.vocab_size, (1, 20 + number))


def request(number):
    params = SamplingParams(max_new_tokens=15, temperature=0.9, seed=number, eos_token_id=-1)
    return Request(number, ids_of(number)[0].astype(np.int32), params)


def text(engine, number):
    return [(token.id, token.logprob) for token in engine.run([request(number)])]


def own_stream(xp):
    return contextlib.nullcontext() if xp is np else xp.cuda.Stream(non_blocking=True)


@pytest.fixture
def model(xp):
    dtype = np.float32 if xp is np else np.float16
    return model_on(xp, TINY, Weights.random(TINY, 0, dtype))


@pytest.mark.parametrize("streams", [False, True])
def test_a_bare_gpt2_in_several_threads(xp, model, streams):
    expected = [host(model(ids_of(i))) for i in range(THREADS)]

    def work(number):
        with own_stream(xp) if streams else contextlib.nullcontext():
            return [host(model(ids_of(number))) for _ in range(20)]

    for found, wanted in zip(at_once(work), expected, strict=True):
        for each in found:
            np.testing.assert_array_equal(each, wanted)


@pytest.mark.parametrize("decode", ["auto", "eager"])
def test_engines_of_one_model_in_several_threads(model, decode):
    expected = [text(Engine(model, decode=decode), i) for i in range(THREADS)]
    engines = [Engine(model, decode=decode) for _ in range(THREADS)]
    assert at_once(lambda i: [text(engines[i], i) for _ in range(4)]) == [[e] * 4 for e in expected]


def test_engines_side_by_side_in_one_thread(model):
    expected = [text(Engine(model), i) for i in range(2)]
    runs = [Engine(model).run([request(i)]) for i in range(2)]
    pairs = [[(token.id, token.logprob) for token in pair] for pair in zip(*runs, strict=True)]
    assert [list(column) for column in zip(*pairs, strict=True)] == expected


def test_an_engine_runs_one_set_of_requests_at_a_time(model):
    engine = Engine(model)
    expected = text(engine, 0)
    first = engine.run([request(0)])
    tokens = [next(first)]
    for attempt in (lambda: text(engine, 1), lambda: at_once(lambda i: text(engine, i))):
        with pytest.raises(BusyError, match="running other requests") as caught:
            attempt()
        assert caught.value.where == "Engine.run" and "close()" in caught.value.remedy
    tokens += first
    assert [(token.id, token.logprob) for token in tokens] == expected, "it was not disturbed"
    left = engine.run([request(1)])
    next(left)
    left.close()
    assert text(engine, 0) == expected, "a run that is left is over"


class Interrupted(BaseException):
    """As Ctrl-C would be."""


@pytest.mark.parametrize("before", [False, True])
def test_a_run_cut_off_in_a_step_leaves_the_engine_in_order(model, before):
    engine = Engine(model)
    expected = text(engine, 0)
    step = engine.decoder.step

    def cut_off(state):
        engine.decoder.step = step
        if not before:
            step(state)
        raise Interrupted

    for _ in range(3):
        engine.decoder.step = cut_off
        with pytest.raises(Interrupted):
            text(engine, 1)
        assert text(engine, 0) == expected


def test_dropping_what_does_not_run_is_nothing(model):
    engine = Engine(model)
    engine.cancel(0)
    expected = text(engine, 0)
    engine.cancel(0)
    assert text(engine, 0) == expected


# -- the turns of ops/core/blas_device.py, on streams that only pretend ----------------------------


class Stream:
    """Notes who waited for it."""

    def __init__(self, ptr):
        self.ptr, self.waits = ptr, 0

    def synchronize(self):
        self.waits += 1


@pytest.fixture
def current(machine, monkeypatch):
    """The current device and stream, to be changed."""
    state = SimpleNamespace(device=0, stream=Stream(0))
    machine().cuda.get_current_stream = lambda: state.stream
    for module in (blas, blas_device):
        monkeypatch.setattr(module, "current_device", lambda: state.device)
    monkeypatch.setattr(blas_device, "_turns", {})
    return state


def test_another_stream_waits_for_the_one_before(current):
    streams = one, other = Stream(1), Stream(3)
    for turn, waits in ((one, [0, 0]), (one, [0, 0]), (other, [1, 0]), (one, [1, 1])):
        current.stream = turn
        with blas.workspace():
            assert [stream.waits for stream in streams] == waits
    # Another object for the same stream, as CuPy may give.
    current.stream = Stream(1)
    with blas.workspace():
        assert one.waits == 1


class Event:
    """Notes who waited for it, and after which stream's work it comes."""

    made: ClassVar[list[Event]] = []

    def __init__(self, **options):
        self.stream, self.waits = None, 0
        self.made.append(self)

    def record(self, stream):
        self.stream = stream

    def synchronize(self):
        self.waits += 1


def test_threads_with_a_default_stream_each_wait_for_each_other(current, monkeypatch):
    """CuPy's per-thread default streams have one number, which names the caller's own."""
    monkeypatch.setattr(sys.modules["cupy"].cuda, "Event", Event, raising=False)
    monkeypatch.setattr(Event, "made", [])
    mine = current.stream = Stream(2)

    def turn(depth=1):
        with contextlib.ExitStack() as stack:
            for _ in range(depth):
                stack.enter_context(blas.workspace())

    turn(), turn()
    assert [event.waits for event in Event.made] == [0, 0], "of one thread they run in order"
    theirs = current.stream = Stream(2)
    for waits in (
        [0, 1, 0],
        [0, 1, 1, 0],
    ):  # the second thread may get the number of the first, which has ended
        thread = threading.Thread(target=turn, args=(2,))
        thread.start()
        thread.join(WAIT)
        assert [event.waits for event in Event.made] == waits
    current.stream = Stream(5)
    turn()
    assert [event.waits for event in Event.made] == [0, 1, 1, 1]
    assert [event.stream for event in Event.made] == [mine, mine, theirs, theirs]
    assert mine.waits == theirs.waits == 0, "the number would have named the waiting thread's own"
    turn()
    assert len(Event.made) == 4, "other streams need no event"


def test_gpus_do_not_wait_for_each_other(current):
    one, current.stream = current.stream, Stream(5)
    for current.device in (0, 1):
        with blas.workspace():
            pass
    assert one.waits == current.stream.waits == 0


def test_inside_a_turn_there_is_no_other(current):
    """A capture has a stream of its own, and waiting for one would spoil it."""
    outer, inner = current.stream, Stream(7)
    with blas.workspace():
        current.stream = inner
        with blas.workspace():
            assert outer.waits == 0
    current.stream = outer
    with blas.workspace():
        assert outer.waits == inner.waits == 0


def test_threads_are_inside_one_after_another(current):
    inside, most = [], []

    def work(number):
        for _ in range(50):
            with blas.workspace(), blas.workspace():
                inside.append(number)
                most.append(len(inside))
                inside.remove(number)

    at_once(work)
    assert set(most) == {1}


def test_a_stream_that_failed_does_not_keep_the_turn(current):
    class Broken(Stream):
        def synchronize(self):
            raise RuntimeError("an illegal address")

    current.stream = Broken(1)
    with blas.workspace():
        pass
    current.stream = Stream(2)
    with pytest.raises(RuntimeError, match="illegal"), blas.workspace():
        raise AssertionError("it was entered")
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(blas.workspace()._lock.acquire, True, 1).result()


@pytest.mark.parametrize("product", ["gemv", "matmul"])
def test_products_take_their_turn(current, monkeypatch, product):
    """Descriptors and workspace are shared: nothing of the library is called outside a turn."""
    depths = []

    def queued(*args):
        depths.append(blas.workspace()._depth)

    monkeypatch.setattr(blas, "handles", lambda device: None)
    monkeypatch.setattr(blas, "_queue_gemv", queued)
    monkeypatch.setattr(blas_product.Product, "__init__", lambda self, *problem: None)
    monkeypatch.setattr(blas_product.Product, "queue", queued)
    apart = (1 << 20, 2 << 20, 0, 0, 3 << 20, 0, 0)
    monkeypatch.setattr(blas.Queued, "_pointers", lambda self: apart)
    blas._product.cache_clear()
    x, weight = np.zeros((1, 8), np.float32), np.zeros((4, 8), np.float32)
    out = np.zeros((1, 4), np.float32)
    if product == "gemv":
        blas.gemv(x, weight, out)
    else:
        blas.matmul(x, weight, None, out)
    blas._product.cache_clear()
    assert depths == [1]
