"""A GPU and a CUPTI that only pretend, and the small runs of these tests."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import numpy as np
from builders import TINY

from gpt2cupy.profile.measure import Session, Settings

PROMPT = np.array([3, 1, 4], np.int32)
SMALL = Settings(warmup=1, runs=3, tokens=5, batch=2)
STEP = 4 + 7 * TINY.n_layer  # ops of a step


class Gpu:
    """A stream with a clock: kernels take 3 us after a gap of 1 us, an event takes 0.5 us.

    While kernels are recorded the gaps are longer by ``recording_us``.
    """

    recording_us = 0.25

    def __init__(self):
        self.now, self.kernels, self.capturing, self.watched = 0.0, [], [], False
        gpu = self

        class Event:
            def record(self, stream):
                assert stream is gpu
                gpu.now += 0.5
                self.time = gpu.now

            def synchronize(self):
                pass

        def elapsed(first, last):
            return (last.time - first.time) / 1e3

        control = SimpleNamespace(
            start=lambda: self.capturing.append("start"), stop=lambda: self.capturing.append("stop")
        )
        cuda = SimpleNamespace(Event=Event, get_elapsed_time=elapsed, profiler=control)
        self.xp = SimpleNamespace(cuda=cuda)

    def kernel(self, name):
        start = self.now + 1 + self.recording_us * self.watched
        self.now = start + 3
        self.kernels.append((int(start * 1e3), int(self.now * 1e3), name))

    def launch_host_func(self, callback, argument):
        pass

    def synchronize(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class FakeCupti:
    """The part of cupti-python that is used."""

    def __init__(self, gpu):
        self.gpu, self.taken, self.log = gpu, 0, []
        self.ActivityKind = SimpleNamespace(CONCURRENT_KERNEL=10)
        self.lose = 0

    def activity_enable(self, kind):
        self.log.append("enable")
        self.gpu.watched = True
        self.taken = len(self.gpu.kernels)

    def activity_register_callbacks(self, requested, completed):
        size, records = requested()
        assert size > 0 and records == 0
        self.completed = completed

    def activity_flush_all(self, flag):
        new = self.gpu.kernels[self.taken :]
        self.taken = len(self.gpu.kernels)
        # Of a run, not of what ran before it and is thrown away.
        if self.lose and len(new) > STEP and new[-1][2] != "prefill":
            self.lose -= 1
            new = new[1:]
        records = [SimpleNamespace(kind=10, start=s, end=e, name=n) for s, e, n in new[::-1]]
        self.completed([*records, SimpleNamespace(kind=1)])

    def activity_disable(self, kind):
        self.log.append("disable")

    def finalize(self):
        self.gpu.watched = False
        self.log.append("finalize")


class PretendedSession(Session):
    """Believes to run on a GPU; the lm_head launch is a library's two kernels."""

    gpu: Gpu

    def __init__(self, model, prompt, settings):
        gpu = self.gpu
        super().__init__(model, prompt, settings)
        self.on_gpu, self.model = True, SimpleNamespace(xp=gpu.xp)
        self.engine = SimpleNamespace(stream=gpu, device=contextlib.nullcontext())
        for op in self.ops:
            names = ["library", "library_reduce"] if op.path == ("lm_head",) else [op.name]
            op.launches = [lambda names=names: [gpu.kernel(name) for name in names]]
        calls = [launch for op in self.ops for launch in op.launches]

        def step(state, n=1):
            for launch in calls * n:
                launch()

        self.decoder = SimpleNamespace(step=step, calls=calls, name="eager")

    def renew_decoder(self):
        self.gpu.kernel("capture")

    def begin(self):
        self.gpu.kernel("prefill")
        self.gpu.now += 1000
        self.state.slots[:] = range(self.state.batch)  # NumPy's step leaves idle rows out


def held(*_):
    """CUPTI's answer while another tool has it."""
    raise RuntimeError("CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED")
