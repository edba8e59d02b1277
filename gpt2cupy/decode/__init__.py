"""The decode step: the state it works on, and the ways to run it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError, shown
from ..model import GPT2
from . import autotune
from .decoder import Decoder, Replay, launched
from .drafts import DRAFTS, DraftState, ops_draft_step, persistent_draft_step
from .graph import captured
from .persistent import check, persistent_step, why_not
from .prompt import PromptRunner, sample_first
from .state import DecodeState
from .step import StepFunction, ops_step

__all__ = [
    "DRAFTS",
    "DecodeState",
    "Decoder",
    "DraftState",
    "PromptRunner",
    "StepFunction",
    "captured",
    "decoder",
    "launched",
    "ops_step",
    "paths",
    "persistent_step",
    "sample_first",
    "times",
    "usable",
    "why_not",
]

# What users name: what a step computes, and how it is replayed. The plainest first.
_PATHS: dict[str, tuple[StepFunction, Replay]] = {
    "eager": (ops_step, launched),
    "graph": (ops_step, captured),
    "persistent": (persistent_step, captured),
}
# The same for steps of a DraftState.
_DRAFTING: dict[StepFunction, StepFunction] = {
    ops_step: ops_draft_step,
    persistent_step: persistent_draft_step,
}


def paths(xp: Any) -> tuple[str, ...]:
    """Names of the ways to run a step on the arrays of NumPy or CuPy, the plainest first."""
    return ("eager",) if xp is np else tuple(_PATHS)


def usable(model: GPT2, rows: int) -> tuple[str, ...]:
    """Those of :func:`paths` that a model has for so many rows."""
    return tuple(
        name for name in paths(model.xp) if name != "persistent" or why_not(model, rows) is None
    )


def times(model: GPT2, rows: int) -> dict[str, float]:
    """What "auto" chooses from, what it takes first, in microseconds a step.

    Measured where there is a choice, on the current device and stream; 0 where there is none.
    """
    found = usable(model, rows)
    if "persistent" not in found:
        return {found[-1]: 0.0}
    decoders = {name: _made(model, name) for name in ("graph", "persistent")}
    return autotune.fastest(model, rows, decoders)


def decoder(
    model: GPT2, name: str = "auto", rows: int | None = None, *, drafting: bool = False
) -> Decoder:
    """A decoder by name; "auto" is the fastest for so many rows, without them a graph.

    With ``drafting`` it runs the steps of a :class:`DraftState`.

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
            f"there is no decode path {shown(name)} here",
            where="decode",
            remedy=f"Use {', '.join(known)} or auto. Graphs need a GPU.",
        )
    if name == "persistent" and rows:
        check(model, rows)
    return _made(model, name, drafting=drafting)


def _made(model: GPT2, name: str, *, drafting: bool = False) -> Decoder:
    function, replay = _PATHS[name]
    step = _DRAFTING[function] if drafting else function
    return Decoder(model, step, replay, name, by_ops=function is ops_step)
