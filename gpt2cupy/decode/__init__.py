"""The decode step: the state it works on, and the ways to run it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..model import GPT2
from . import autotune
from .eager import EagerDecoder
from .graph import GraphDecoder
from .persistent import PersistentDecoder, check, why_not
from .prompt import PromptRunner, sample_first
from .state import DecodeState

__all__ = [
    "DecodeState",
    "EagerDecoder",
    "GraphDecoder",
    "PersistentDecoder",
    "PromptRunner",
    "decoder",
    "paths",
    "sample_first",
    "times",
    "usable",
    "why_not",
]


def paths(xp: Any) -> dict[str, type[EagerDecoder]]:
    """The ways to run a step on the arrays of NumPy or CuPy by name, the plainest first."""
    if xp is np:
        return {"eager": EagerDecoder}
    return {"eager": EagerDecoder, "graph": GraphDecoder, "persistent": PersistentDecoder}


def usable(model: GPT2, rows: int) -> dict[str, type[EagerDecoder]]:
    """Those of :func:`paths` that a model has for so many rows."""
    return {
        name: path
        for name, path in paths(model.xp).items()
        if name != "persistent" or why_not(model, rows) is None
    }


def times(model: GPT2, rows: int) -> dict[str, float]:
    """What "auto" chooses from, what it takes first, in microseconds a step.

    Measured where there is a choice, on the current device and stream; 0 where there is none.
    """
    found = usable(model, rows)
    if "persistent" not in found:
        return {list(found)[-1]: 0.0}
    return autotune.fastest(model, rows, {name: found[name] for name in ("graph", "persistent")})


def decoder(model: GPT2, name: str = "auto", rows: int | None = None) -> EagerDecoder:
    """A decoder by name; "auto" is the fastest for so many rows, without them a graph.

    Raises
    ------
    InputError
        If the model's device has no such path, or the model none for so many rows.
    """
    known = paths(model.xp)
    if name == "auto":
        plain = "graph" if "graph" in known else "eager"
        name = next(iter(times(model, rows))) if rows else plain
    if name not in known:
        raise InputError(
            f"there is no decode path {name!r} here",
            where="decode",
            remedy=f"Use {', '.join(known)} or auto. Graphs need a GPU.",
        )
    if name == "persistent" and rows:
        check(model, rows)
    return known[name](model)
