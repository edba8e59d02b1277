"""The engine process's loop, with sockets that are lists and a clock that is set by hand."""

from __future__ import annotations

import numpy as np
import pytest
import zmq

from gpt2cupy.errors import DeviceError, DeviceMemoryError, InputError
from gpt2cupy.sampling import SamplingParams
from gpt2cupy.server import engine_process, messages
from gpt2cupy.server.messages import Cancel, Failed, Hello, Ready, Submit, Tick
from gpt2cupy.server.metrics import Store, value_of
from gpt2cupy.server.mock import MockEngine
from gpt2cupy.server.worker import Worker


class Line:
    """A ROUTER that is two lists."""

    def __init__(self):
        self.inbox, self.sent = [], []

    def poll(self, _):
        return len(self.inbox)

    def get(self, _):
        return zmq.POLLIN if self.inbox else 0

    def recv_multipart(self, _):
        identity, posted = self.inbox.pop(0)
        return identity, messages.encode(posted)

    def send_multipart(self, parts, copy):
        self.sent.append((parts[0], messages.decode_to_front(parts[1])))

    def of(self, identity, kind):
        return [m for who, posted in self.sent if who == identity for m in posted
                if isinstance(m, kind)]  # fmt: skip


class Served:
    def __init__(self, folder, engine=None, coalesce=0.0):
        self.line, self.now, self.store = Line(), 0.0, Store(folder, "engine")
        self.engine = engine or MockEngine(2, 1e6)
        self.worker = Worker(
            self.engine, self.line, self.store, {"slots": 2}, coalesce=coalesce, clock=self.clock
        )

    def clock(self):
        self.now += 0.001
        return self.now

    def post(self, identity, *posted):
        self.line.inbox.append((identity, list(posted)))

    def tokens(self, identity):
        found = {}
        for tick in self.line.of(identity, Tick):
            pairs = zip(messages.ints(tick.streams, "q"), messages.ints(tick.ids), strict=True)
            for stream, id_ in pairs:
                found.setdefault(stream, []).append(id_)
        return found

    def run(self, turns=12):
        for _ in range(turns):
            self.worker.turn()


def submit(stream, tokens=3, prompt=(5, 6, 7), **params):
    given = messages.params_of(SamplingParams(max_new_tokens=tokens, **params))
    return Submit(stream, messages.packed(prompt), given, 0, [], 0.0)


def test_each_front_gets_the_tokens_of_its_own_streams(tmp_path):
    served = Served(tmp_path)
    served.post(b"a", Hello(0), submit(7), submit(8, tokens=2))
    served.post(b"b", Hello(1), submit(7, tokens=1, prompt=(9,)))
    served.run()
    assert served.line.of(b"a", Ready)[0].about == {"slots": 2}
    assert served.tokens(b"a") == {7: [5, 6, 7], 8: [5, 6]}
    assert served.tokens(b"b") == {7: [9]}
    ends = [end for tick in served.line.of(b"a", Tick) for end in tick.finished]
    assert sorted(ends) == [[7, "length"], [8, "length"]] or sorted(ends) == [
        (7, "length"), (8, "length")
    ]  # fmt: skip
    numbers = served.store.numbers
    assert value_of(numbers, "vllm:generation_tokens") == 6
    assert value_of(numbers, "vllm:prompt_tokens") == 7
    assert value_of(numbers, "vllm:request_success", "length") == 3


def test_tokens_are_kept_back_and_go_out_together(tmp_path):
    served = Served(tmp_path, coalesce=1.0)
    served.post(b"a", Hello(0), submit(1, tokens=5))
    served.run()
    (tick,) = served.line.of(b"a", Tick)
    assert len(messages.ints(tick.ids)) == 5


def test_a_stream_that_is_cancelled_says_no_more_and_its_line_is_used_again(tmp_path):
    served = Served(tmp_path)
    served.post(b"a", Hello(0), submit(1, tokens=400))
    served.run(4)
    count = len(served.tokens(b"a")[1])
    served.post(b"a", Cancel([1, 99]))
    served.run(4)
    assert len(served.tokens(b"a")[1]) == count
    for stream in range(2, 500):
        served.post(b"a", submit(stream, tokens=1))
        served.run(2)
    assert all(len(served.tokens(b"a")[stream]) == 1 for stream in range(2, 500))
    assert len(served.worker.stations.fronts) == 256


def test_a_front_that_takes_the_place_of_another_ends_its_streams(tmp_path):
    served = Served(tmp_path)
    served.post(b"a", Hello(0), submit(1, tokens=400), submit(2, tokens=400))
    served.run(3)
    served.post(b"new", Hello(0), submit(1, tokens=2))
    served.post(b"a", submit(3))  # what a dead front had still said
    served.run(6)
    assert served.tokens(b"new") == {1: [5, 6]}
    assert served.engine.idle


def test_what_the_engine_refuses_fails_alone(tmp_path):
    served = Served(tmp_path)
    plain = served.engine.submit

    def refusing(request):
        if len(request.prompt) == 1:
            raise InputError("too short", where="prompt")
        return plain(request)

    served.engine.submit = refusing
    served.post(b"a", Hello(0), submit(1, prompt=(4,)), submit(2))
    served.run()
    (failed,) = served.line.of(b"a", Failed)
    assert failed.stream == 1 and failed.status == 400 and "too short" in failed.message
    assert served.tokens(b"a") == {2: [5, 6, 7]}


def test_a_step_that_fails_is_told_to_all(tmp_path):
    served = Served(tmp_path)
    served.post(b"a", Hello(0), submit(1, tokens=9), submit(2, tokens=9))
    served.run(2)

    def broken():
        raise DeviceError("lost")

    served.engine.step = broken
    with pytest.raises(DeviceError):
        served.run()
    assert sorted(m.stream for m in served.line.of(b"a", Failed)) == [1, 2]
    assert value_of(served.store.numbers, "vllm:request_success", "error") == 2


def test_settings_are_carried_without_what_is_default():
    params = SamplingParams(temperature=0.5, stop=["x"], logit_bias={3: -float("inf"), 4: 10**30})
    given = messages.params_of(params)
    assert set(given) == {"temperature", "stop", "logit_bias"}
    (again,) = messages.decode_to_engine(messages.encode([submit(1)]))
    assert SamplingParams.unchecked(again.params) == SamplingParams(max_new_tokens=3)
    frame = messages.encode([Submit(1, b"", given, 0, [], 0.0)])
    back = SamplingParams.unchecked(messages.decode_to_engine(frame)[0].params)
    assert back.logit_bias == {3: -float("inf"), 4: 1e30} and back.temperature == 0.5


class Model:
    """On a GPU, whose engines fit a number of slots."""

    class config:
        n_positions = 64

    class xp:
        @staticmethod
        def get_default_memory_pool():
            class Pool:
                def free_all_blocks(self):
                    pass

            return Pool()


@pytest.mark.parametrize("fits, asked, slots", [(300, 256, 256), (100, 256, 64), (1, 256, 1)])
def test_slots_are_halved_until_they_fit(monkeypatch, fits, asked, slots):
    from gpt2cupy.generation import engine

    def made(model, count, capacity, **options):
        if count > fits:
            raise DeviceMemoryError(f"a cache of {count} slots")
        return np.zeros(count)

    monkeypatch.setattr(engine, "Engine", made)
    assert len(engine_process.fitting_engine(Model, asked, None, "auto")) == slots
    if fits == 1:
        fits = 0
        with pytest.raises(DeviceMemoryError):
            engine_process.fitting_engine(Model, 1, None, "auto")

    class OnCpu(Model):
        xp = np

    fits = 70
    assert len(engine_process.fitting_engine(OnCpu, 256, None, "auto")) == 64


def test_a_context_that_cannot_be_is_refused():
    with pytest.raises(InputError, match="impossible"):
        engine_process.fitting_engine(Model, 1, 65, "auto")
    with pytest.raises(InputError, match="65537 slots are impossible"):
        engine_process.fitting_engine(Model, 65537, None, "auto")
