"""The parts of a decode step, and which op belongs to which: told by the weight it reads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .. import model as model_module
from .. import ops
from ..decode import DecodeState, EagerDecoder
from ..decode import eager as eager_module
from ..errors import InputError
from ..model import GPT2
from . import counts
from .counts import Cost

# The rows of each table, in the order of the forward pass.
TABLES: dict[str, tuple[str, ...]] = {
    "model": ("embeddings", "blocks", "final norm", "lm_head"),
    "block": ("ln_1", "attention", "ln_2", "mlp"),
    "attention": ("qkv product", "attention over the cache", "output product"),
    "mlp": ("expansion + activation", "projection"),
}
# What a row does in one launch where other implementations have several steps.
COVERS: dict[str, tuple[str, ...]] = {
    "embeddings": ("token embedding", "position embedding", "their sum"),
    "attention over the cache": (
        "qkv reshape", "cache update", "scores", "mask", "softmax", "values", "output reshape",
    ),
    "output product": ("product", "bias", "residual addition"),
    "expansion + activation": ("expansion", "activation"),
    "projection": ("product", "bias", "residual addition"),
    "sampling": ("logits processors", "choice of the token", "log-probability"),
}  # fmt: skip
_WEIGHTS = {
    "ln1_w": ("blocks", "ln_1"),
    "qkv_w": ("blocks", "attention", "qkv product"),
    "proj_w": ("blocks", "attention", "output product"),
    "ln2_w": ("blocks", "ln_2"),
    "fc_w": ("blocks", "mlp", "expansion + activation"),
    "out_w": ("blocks", "mlp", "projection"),
}
CACHE = ("blocks", "attention", "attention over the cache")
SAMPLING = ("sampling",)
NAMES = tuple(dict.fromkeys(["block", *(row for rows in TABLES.values() for row in rows)]))


def component(name: str) -> str:
    """The component that a name means: itself, a part that it covers, or a unique beginning.

    Raises
    ------
    InputError
        If there is none, or more than one.
    """
    wanted = name.strip().lower()
    known = ("model", *NAMES, *SAMPLING)
    if wanted in known:
        return wanted
    covering = [row for row, parts in COVERS.items() if wanted in parts]
    starting = [each for each in known if wanted and each.startswith(wanted)]
    found = covering if len(covering) == 1 else starting
    if len(found) != 1:
        raise InputError(
            f"unknown component {name!r}", where="--component", remedy=f"Use {', '.join(known)}."
        )
    return found[0]


@dataclass
class Op:
    """One op of a step.

    Attributes
    ----------
    name : str
        Function of :mod:`gpt2cupy.ops`.
    path : tuple of str
        Components from the outside in.
    layer : int or None
    launches : list of callable
        The checked launches it was recorded as; empty on NumPy.
    costs : list of Cost or None
        What each launch must do; one entry on NumPy.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    launches: list[Callable[[], Any]] = field(default_factory=list)
    costs: list[Cost | None] = field(default_factory=list)

    def within(self, name: str) -> bool:
        """Whether the op is a part of the component."""
        if name == "model":
            return self.path != SAMPLING
        return ("blocks" if name == "block" else name) in self.path

    @property
    def label(self) -> str:
        """For ranges and traces: ``blocks.3/attention/qkv product``."""
        first, *rest = self.path
        return "/".join([first if self.layer is None else f"{first}.{self.layer}", *rest])


class _Observed:
    """Stands where :mod:`gpt2cupy.ops` stood and tells ``around`` of every call."""

    def __init__(self, around: Callable[..., Any]) -> None:
        self._around = around

    def call(self, name: str, function: Any, *args: Any, **options: Any) -> Any:
        return self._around(name, function, args, options)

    def __getattr__(self, name: str) -> Any:
        function = functools.partial(self.call, name, getattr(ops, name))
        setattr(self, name, function)  # the next look-up costs nothing
        return function


@contextlib.contextmanager
def observed(around: Callable[..., Any]) -> Iterator[_Observed]:
    """Within, every op that the model or the sampler calls goes through ``around``.

    Parameters
    ----------
    around : callable(name, function, args, options)
        Has to call ``function(*args, **options)`` and return its result.
    """
    stand_in = _Observed(around)
    modules = model_module, eager_module
    for module in modules:
        module.ops = stand_in  # type: ignore[attr-defined]
    try:
        yield stand_in
    finally:
        for module in modules:
            module.ops = ops  # type: ignore[attr-defined]


class _Places:
    """Which component an array of weights, or a layer of the cache, belongs to."""

    def __init__(self, model: GPT2, state: DecodeState) -> None:
        self.of: dict[int, tuple[tuple[str, ...], int | None]] = {
            id(model.weights.lnf_w): (("final norm",), None)
        }
        for number, layer in enumerate(model.layers):
            for name, path in _WEIGHTS.items():
                self.of[id(layer[name])] = path, number
            self.of[id(state.cache.layers[number][0])] = CACHE, number

    def __call__(self, op: str, args: tuple) -> tuple[tuple[str, ...], int | None]:
        if op == "embedding":
            return ("embeddings",), None
        if op == "sample":
            return SAMPLING, None
        for array in args:
            if id(array) in self.of:
                return self.of[id(array)]
        # The one product left: its matrix may be the token table itself.
        return ("lm_head",), None


def ops_of_step(model: GPT2, state: DecodeState, decoder: EagerDecoder, context: float) -> list[Op]:
    """The ops of one eager step in order, labelled and counted.

    On the GPU the step is only recorded; on NumPy it is run once.

    Parameters
    ----------
    context : float
        Tokens that each row's slot holds before a step, for the cost of attention.
    """
    places, found = _Places(model, state), list[Op]()

    def around(name: str, function: Any, args: tuple, options: dict[str, Any]) -> Any:
        begin = len(decoder.calls)
        result = function(*args, **options)
        launches = decoder.calls[begin:]
        path, layer = places(name, args)
        given = options | ({"context": context} if name == "attention_decode" else {})
        costs = counts.of_parts(name, args, given, max(1, len(launches)))
        found.append(Op(name, path, layer, launches, costs))
        return result

    with observed(around):
        if model.xp is np:
            decoder.step(state)
        else:
            decoder.prepare(state)
    return found
