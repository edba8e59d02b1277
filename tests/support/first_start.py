"""What a first start compiles, without a GPU: ``python first_start.py N_EMBD PROMPT``.

Arrays are NumPy's, taken for a GPU's as in launch_recorder.py. Writes a line of JSON for each
event up to the second token: a kernel requested, or one that was loaded.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import launch_recorder
import numpy as np


def say(event: str, source: str, **defines: str) -> None:
    print(json.dumps({"event": event, "source": source, "defines": defines}))


class Device:
    """The one GPU, also as a context."""

    id = 0

    def __init__(self, index: int = 0) -> None: ...

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *exception: object) -> None: ...


class Stream(Device):
    """Does everything at once; a graph does nothing."""

    ptr = 0

    def __init__(self, **options: bool) -> None: ...

    def synchronize(self) -> None: ...

    def begin_capture(self) -> None: ...

    def end_capture(self) -> SimpleNamespace:
        return SimpleNamespace(launch=lambda stream: None)


def pretend() -> None:
    """Make this process believe in an H200 that keeps nothing between starts."""
    cupy = sys.modules["cupy"] = launch_recorder._cupy()
    array = launch_recorder.Array
    array.device, array.set = Device(), lambda self, value: None
    array.data = property(
        lambda self: SimpleNamespace(
            ptr=self.ctypes.data // 16 * 16,
            device_id=0,
            copy_from_host_async=lambda *host: None,
        )
    )
    cupy.cuda.Stream, cupy.cuda.Device = Stream, Device
    cupy.cuda.get_current_stream = Stream
    cupy.cuda.Event = lambda **options: SimpleNamespace(
        synchronize=lambda: None, record=lambda *stream: None
    )
    cupy.cuda.get_elapsed_time = lambda begin, end: 1.0
    cupy.cuda.memory = SimpleNamespace(OutOfMemoryError=MemoryError)
    cupy.cuda.driver = SimpleNamespace(CUDADriverError=RuntimeError)
    from gpt2cupy.decode import autotune, state
    from gpt2cupy.ops.core import blas, compiler, device, launch, tape

    device.cupy_packages = lambda: ("cupy",)
    device.device_arch = launch.device_arch = lambda index: "sm_90"
    device._sm_count, device._shared_limit = lambda index: 132, lambda index: 227 << 10
    blas.gemv = blas.matmul = lambda *args, **options: None
    tape.Launch.__call__ = tape.Launch.overlapped = lambda self: self.load()
    autotune._kept, autotune._key = lambda *given: None, lambda *given: ""
    compiler.write_atomically = lambda path, data: path
    state._mapped = lambda cupy, shape: (np.zeros(shape, np.uint8), cupy.zeros(shape, np.uint8))
    state.DecodeState.read_rows = lambda self, rows, steps: (
        np.full(len(steps), 5, np.int32),
        np.full(len(steps), -1, np.float32),
    )

    def request(source, defines, arch):
        say("request", source, **defines)
        return Future()

    def function(device, kernel, elem, head_size, inner, shared):
        say("load", kernel.source, **kernel.defines(elem, head_size, inner))

    compiler.request, launch._function = request, function


def main(channels: int, prompt: int) -> None:
    pretend()
    import cupy

    from gpt2cupy.config import GPT2Config
    from gpt2cupy.generation.engine import Engine
    from gpt2cupy.generation.request import Request
    from gpt2cupy.model import GPT2
    from gpt2cupy.sampling import SamplingParams
    from gpt2cupy.weights import Weights

    config = GPT2Config(
        n_layer=1, n_head=channels // 64, n_embd=channels, vocab_size=500, n_positions=256
    )
    weights = Weights.empty(config, np.dtype(np.float16), cupy)
    model = GPT2(config, weights)
    model.xp = cupy
    engine = Engine(model, 1)
    ids = np.arange(prompt, dtype=np.int32)
    tokens = engine.run([Request(0, ids, SamplingParams(max_new_tokens=9), 0, -1)])
    print(json.dumps({"event": "token", "source": str(next(tokens).id), "defines": {}}))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main(int(sys.argv[1]), int(sys.argv[2]))
