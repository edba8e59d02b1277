"""The decode step: the state it works on, and the ways to run it."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InputError
from ..model import GPT2
from .eager import EagerDecoder
from .graph import GraphDecoder
from .prompt import PromptRunner
from .state import DecodeState

__all__ = ["DecodeState", "EagerDecoder", "GraphDecoder", "PromptRunner", "decoder", "paths"]


def paths(xp: Any) -> dict[str, type[EagerDecoder]]:
    """The ways to run a step on the arrays of NumPy or CuPy by name, the plainest first."""
    if xp is np:
        return {"eager": EagerDecoder}
    return {"eager": EagerDecoder, "graph": GraphDecoder}


def decoder(model: GPT2, name: str = "auto") -> EagerDecoder:
    """A decoder by name; "auto" is the fastest.

    Raises
    ------
    InputError
        If the model's device has no such path.
    """
    known = paths(model.xp)
    if name == "auto":
        name = list(known)[-1]
    if name not in known:
        raise InputError(
            f"there is no decode path {name!r} here",
            where="decode",
            remedy=f"Use {', '.join(known)} or auto. Graphs need a GPU.",
        )
    return known[name](model)
