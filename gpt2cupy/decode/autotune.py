"""Which way to run a step is the fastest: measured once for a GPU and a shape, and remembered."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..model import GPT2
from ..ops.core import compiler, cuda_source, launch
from ..sampling import SamplingParams
from .decoder import Decoder
from .state import DecodeState

# Of a measurement: where it starts, steps at a time, times until the clocks are up, and after.
CONTEXT, STEPS, WARM, ROUNDS = 256, 8, 40, 9
# Another path has other last bits: not for a difference that is noise.
MARGIN = 1.03
_FILE = "decode-paths.json"
_measuring = threading.Lock()  # two at once would measure each other


def fastest(model: GPT2, rows: int, decoders: dict[str, Decoder]) -> dict[str, float]:
    """Microseconds of a step by path, the one to take first; of all models of this shape, once.

    The first of ``decoders`` is taken unless another is faster beyond the noise.

    Parameters
    ----------
    model : GPT2
        On the current device.
    rows : int
    decoders : dict
        Those to take one from, by path.
    """
    file, key = compiler.cache_dir() / _FILE, _key(model, rows, decoders)
    with _measuring:
        found = _kept(file, key, decoders)
        if found is None:
            found = _measure(model, rows, decoders)
            entry = {"us": found, "sources": _digests(source for source, *_ in launch.loaded)}
            kept = json.dumps(_read(file) | {key: entry}, indent=1)
            # Where it cannot be kept, each process measures again.
            with contextlib.suppress(OSError):
                compiler.write_atomically(file, kept.encode())
    first = next(iter(decoders))
    return dict(
        sorted(found.items(), key=lambda item: item[1] / (MARGIN if item[0] == first else 1))
    )


def context_of(model: GPT2) -> int:
    """Tokens before the steps that are measured."""
    return min(CONTEXT, model.config.n_positions // 2)


def _kept(file: Path, key: str, decoders: dict[str, Decoder]) -> dict[str, float] | None:
    """What was measured before; None if that is not known for all paths and today's kernels."""
    entry = _read(file).get(key)
    if not isinstance(entry, dict):
        return None
    found, sources = entry.get("us"), entry.get("sources")
    if not isinstance(found, dict) or set(found) != set(decoders):
        return None
    if not isinstance(sources, dict) or sources != _digests(sources):
        return None
    return found if all(isinstance(us, float) for us in found.values()) else None


def _digests(sources: Iterable[str]) -> dict[str, dict[str, str]]:
    """The digests of those sources that there are, and of what they include."""
    known = {source for source in sources if source in cuda_source.sources()}
    return {source: cuda_source.source_digests(source) for source in sorted(known)}


def _key(model: GPT2, rows: int, decoders: dict[str, Decoder]) -> str:
    """What the times depend on beside the kernels: the GPU, the shape."""
    properties = model.xp.cuda.runtime.getDeviceProperties(model.weights.wte.device.id)
    nvrtc = ".".join(map(str, compiler.nvrtc_version()))
    config = model.config
    shape = [config.n_layer, config.n_embd, config.n_head, config.padded_vocab_size]
    shape += [config.n_positions, rows]
    parts = [properties["name"].decode(), __version__, nvrtc, model.dtype.name, *shape, *decoders]
    return " ".join(map(str, parts))


def _measure(model: GPT2, rows: int, decoders: dict[str, Decoder]) -> dict[str, float]:
    """Microseconds of a step by path, in turn, so that all find the same clocks."""
    xp, context = model.xp, context_of(model)
    cache = model.new_cache(rows, min(context + STEPS, model.config.n_positions))
    state = DecodeState(model, cache, rows)
    for row in range(rows):
        state.assign(row, row, SamplingParams().row(0, 0, -1))
    # The kernels of all are compiled side by side; the largest, of the last path, from the start.
    for decoder in reversed(decoders.values()):
        decoder.record(state)
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for _ in range(WARM + ROUNDS):
        for name, decoder in decoders.items():
            for row in range(rows):
                state.seek(row, context)
            begin, end = xp.cuda.Event(), xp.cuda.Event()
            begin.record()
            decoder.step(state, STEPS)
            end.record()
            end.synchronize()
            times[name].append(xp.cuda.get_elapsed_time(begin, end) * 1e3 / STEPS)
    return {name: float(np.median(each[WARM:])) for name, each in times.items()}


def _read(file: Path) -> dict[str, Any]:
    """What is remembered; a file that cannot be read remembers nothing."""
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}
