"""The engine process: ``python -m gpt2cupy.server.engine_process GENERATION SETTINGS``."""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from ..errors import DeviceMemoryError, Gpt2CupyError, InputError
from .metrics import Store
from .settings import Settings

ON_GPU, ON_CPU = 256, 16  # slots where none are asked for
_CANNOT_START = 2  # exit code for what another start would not mend


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    end_with_parent()
    generation, settings = int(sys.argv[1]), Settings.from_json(sys.argv[2])
    try:
        serve(generation, settings)
    except Gpt2CupyError as error:
        tell_failure(error)
        sys.exit(_CANNOT_START)


def end_with_parent() -> None:
    """End this process when the one that started it closes stdin or dies."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def tell(event: str, **about: Any) -> None:
    """A line for the process that started this one."""
    os.write(1, (json.dumps({"event": event, **about}) + "\n").encode())


def tell_failure(error: Gpt2CupyError) -> None:
    """Why this process cannot start, in its parts."""
    of_caller = isinstance(error, InputError)
    tell("failed", what=error.what, where=error.where, remedy=error.remedy, of_caller=of_caller)


def serve(generation: int, settings: Settings) -> None:
    """Load, warm up, and answer fronts until the process is ended."""
    import zmq

    from .worker import Worker

    start = time.monotonic()
    store = Store(settings.folder, "engine")
    socket: Any = zmq.Context.instance(io_threads=1).socket(zmq.ROUTER)
    socket.set(zmq.SNDHWM, 0)
    socket.set(zmq.RCVHWM, 0)
    socket.set(zmq.LINGER, 0)
    engine, about = make_engine(settings)
    about["seconds"] = round(time.monotonic() - start, 2)
    socket.bind(settings.engine_address(generation))
    # What lives now lives for good: no collection has to look at it again.
    gc.collect()
    gc.freeze()
    store.set("gpt2cupy:engine_up", 1)
    tell("ready", **about)
    Worker(engine, socket, store, about, coalesce=settings.coalesce).run()


def make_engine(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """The engine, warm, and what there is to know of it."""
    if settings.engine:
        return other_engine(settings)
    from .. import loading
    from ..model import GPT2
    from .warm import warm_up

    weights, source = loading.load_weights(
        settings.model, dtype=settings.dtype, device=settings.device, revision=settings.revision,
        variant=settings.variant, adapter=settings.adapter, quantize=settings.quantize,
    )  # fmt: skip
    model = GPT2(source.config, weights, batch_invariant=settings.batch_invariant)
    if settings.gemv is not None:
        model.force_gemv(settings.gemv)
    on_gpu = model.xp is not np
    asked = settings.slots or (ON_GPU if on_gpu else ON_CPU)
    capacity = settings.capacity or None
    engine = fitting_engine(
        model, asked, capacity, settings.decode, prefix_cache=settings.prefix_cache
    )
    if engine.slots < asked:
        tell("note", message=f"{asked} slots do not fit the memory: {engine.slots} are used")
    graphs = warm_up(engine)
    device = "cpu"
    if on_gpu:
        properties = model.xp.cuda.runtime.getDeviceProperties(weights.wpe.device.id)
        device = f"cuda:{weights.wpe.device.id} ({properties['name'].decode()})"
    about = {"slots": engine.slots, "capacity": engine.cache.capacity, "device": device}
    return engine, about | {"dtype": str(model.dtype), "graphs": graphs}


def other_engine(settings: Settings) -> tuple[Any, dict[str, Any]]:
    """What benchmarks and tests put in an engine's place."""
    what, _, how = settings.engine.rpartition(":")
    if what == "mock":
        from .mock import MockEngine

        slots = settings.slots or ON_GPU
        return MockEngine(slots, float(how)), {"slots": slots, "device": "mock"}
    return runpy.run_path(what)[how](settings)


def fitting_engine(
    model: Any, slots: int, capacity: int | None, decode: str, *, prefix_cache: bool = True
) -> Any:
    """An engine of so many slots, or of the largest half, quarter, ... that fits the memory.

    Raises
    ------
    DeviceMemoryError
        If not even one slot fits.
    InputError
        For a number of slots or a capacity that cannot be.
    """
    from ..generation.engine import Engine
    from ..generation.lists import MAX_BATCH

    if slots > MAX_BATCH:
        raise InputError(
            f"{slots} slots are impossible",
            where="--slots",
            remedy=f"They must be from 1 to {MAX_BATCH}.",
        )
    if capacity is not None and not 2 <= capacity <= model.config.n_positions:
        raise InputError(
            f"a context of {capacity} tokens is impossible",
            where="--context",
            remedy=f"It must be from 2 to {model.config.n_positions}.",
        )
    while True:
        try:
            return Engine(model, slots, capacity, decode=decode, prefix_cache=prefix_cache)
        except DeviceMemoryError:
            if slots == 1:
                raise
            slots //= 2
            if model.xp is not np:
                model.xp.get_default_memory_pool().free_all_blocks()


if __name__ == "__main__":
    main()
