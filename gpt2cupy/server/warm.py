"""What is made before the first request: kernels compiled and loaded, graphs captured."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..decode.decoder import launched
from ..generation.engine import Engine
from ..generation.request import Request
from ..generation.scheduler import bucket
from ..sampling import SamplingParams

# The usual kinds of sampling: no more than a temperature, and filters.
KINDS = SamplingParams(max_new_tokens=2), SamplingParams(max_new_tokens=2, temperature=1, top_k=8)


def warm_up(engine: Engine) -> int:
    """Capture the steps of all numbers of rows and the usual prompts; returns how many graphs.

    What was not captured runs launch by launch from then on, as a capture takes longer than many
    steps.
    """
    if engine.model.xp is np:
        _run(engine, KINDS[0], 1)
        return 0
    with engine.device, engine.stream:
        # Arrays that a graph of sampling knows: they may not appear later.
        engine.state.set_processors(0, [0], {0: 1.0})
        engine.state.set_bias(0, None)
    for params in KINDS:
        _run(engine, params, 1)
    graphs = 0
    with engine.device, engine.stream:
        for rows in _row_buckets(engine.slots):
            decoder, state = engine.rows.decoder(rows), engine.state.first(rows)
            for shaped in (set(), {0}):
                before, state.shaped = state.shaped, shaped
                decoder.prepare(state)
                state.shaped = before
                graphs += 1
            decoder.replay = launched
        # An engine of one slot samples the first token in the prompt's graph.
        graphs += engine.prompts.capture(engine.state if engine.slots == 1 else None)
        engine.stream.synchronize()
    return graphs


def _row_buckets(slots: int) -> list[int]:
    return sorted({bucket(rows, slots) for rows in range(1, slots + 1)})


def _run(engine: Engine, params: SamplingParams, count: int) -> None:
    prompt = np.zeros(3, np.int32)
    made: list[Any] = [Request(("warm", i), prompt, params, eos=-1) for i in range(count)]
    for _ in engine.blocks(made):
        pass
