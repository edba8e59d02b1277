"""Engines that tests put into the engine process, by ``--engine FILE:FUNCTION``."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np

FAILS_AT = 40  # position from which the logits of `failing` are not finite


def _ours(settings: Any) -> tuple[Any, dict[str, Any]]:
    from gpt2cupy.server.engine_process import make_engine

    return make_engine(msgspec.structs.replace(settings, engine=""))


def failing(settings: Any) -> tuple[Any, dict[str, Any]]:
    """An engine whose logits are not finite after so many tokens."""
    engine, about = _ours(settings)
    engine.model.weights.wpe[FAILS_AT] = np.inf
    return engine, about


def breaking(settings: Any) -> tuple[Any, dict[str, Any]]:
    """An engine one of whose steps raises: that in which a request with the seed 666 waits."""
    engine, about = _ours(settings)
    submit, step, armed = engine.submit, engine.step, []

    def watched(request: Any) -> Any:
        if request.params.seed == 666:
            armed.append(request)
        return submit(request)

    def broken() -> Any:
        block = step()
        if armed:
            raise RuntimeError("broken on purpose")
        return block

    engine.submit, engine.step = watched, broken
    return engine, about


def slow_to_start(settings: Any) -> tuple[Any, dict[str, Any]]:
    """An engine that is there after a second."""
    time.sleep(1)
    return _ours(settings)
