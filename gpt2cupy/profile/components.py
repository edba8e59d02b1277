"""The parts of a decode step, and which op belongs to which: told by the weight it reads."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from .. import model as model_module
from .. import ops
from ..decode import DecodeState, EagerDecoder
from ..decode import eager as eager_module
from ..decode import persistent as persistent_module
from ..errors import InputError, shown
from ..model import GPT2
from ..ops.core.launch import is_device_array
from ..ops.core.tape import load, recorded
from ..ops.gpt2 import step
from . import counts
from .counts import Cost

# The rows of each table, in the order of the forward pass.
TABLES: dict[str, tuple[str, ...]] = {
    "model": ("embeddings", "blocks", "final norm", "lm_head"),
    "block": ("ln_1", "attention", "ln_2", "mlp"),
    "attention": ("qkv product", "attention over the cache", "output product"),
    "mlp": ("expansion + activation", "projection"),
}
# What a row does where other implementations have several steps; norms come before a product
# when its kernel makes them too.
COVERS: dict[str, tuple[str, ...]] = {
    "embeddings": ("token embedding", "position embedding", "their sum"),
    "qkv product": ("product", "bias"),
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
# Ops with a place of their own, whatever weights they read first, and the other components that
# they make. A kernel that fuses several rows of a table is an entry here, a row of the table,
# what it covers, and its bytes and operations in counts.py.
OPS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "embedding": (("embeddings",), ()),
    "sample": (SAMPLING, ()),
}
NAMES = tuple(dict.fromkeys(["block", *(row for rows in TABLES.values() for row in rows)]))
# The persistent step is everything up to the logits.
OPS["decode_step"] = (("blocks",), tuple(name for name in NAMES if name not in ("block", "blocks")))


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
            f"unknown component {shown(name)}",
            where="--component",
            remedy=f"Use {', '.join(known)}.",
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
    fused : tuple of str
        Other components that its one kernel makes too.
    """

    name: str
    path: tuple[str, ...]
    layer: int | None
    launches: list[Callable[[], Any]] = field(default_factory=list)
    costs: list[Cost | None] = field(default_factory=list)
    fused: tuple[str, ...] = ()

    def touches(self, name: str) -> bool:
        """Whether the op is a part of the component, or makes it on the way."""
        return self.within(name) or name in self.fused

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

    def norm_linear(self, x: Any, *args: Any, h: Any = None, **options: Any) -> Any:
        """On NumPy as the two ops it is, so that both are seen; a kernel may be one."""
        if is_device_array(x):
            options |= {"h": h}
            return self.call("norm_linear", ops.norm_linear, x, *args, **options)
        norm, product = args[:3], args[3:]
        return self.linear(self.layer_norm(x, *norm, out=h), *product, **options)

    def __getattr__(self, name: str) -> Any:
        function = functools.partial(self.call, name, getattr(ops, name))
        setattr(self, name, function)  # the next look-up costs nothing
        return function


@contextlib.contextmanager
def observed(around: Callable[..., Any]) -> Iterator[None]:
    """Within, every op that the model or the sampler calls goes through ``around``.

    Parameters
    ----------
    around : callable(name, function, args, options)
        Has to call ``function(*args, **options)`` and return its result.
    """
    stand_in = _Observed(around)
    whole = functools.partial(stand_in.call, "decode_step", step.decode_step)
    modules = model_module, eager_module
    for module in modules:
        module.ops = stand_in  # type: ignore[attr-defined]
    persistent_module.step = SimpleNamespace(  # type: ignore[assignment, attr-defined]
        **(vars(step) | {"decode_step": whole})
    )
    try:
        yield
    finally:
        for module in modules:
            module.ops = ops  # type: ignore[attr-defined]
        persistent_module.step = step  # type: ignore[attr-defined]


class _Places:
    """Which component an array of weights, or a layer of the cache, belongs to."""

    def __init__(self, model: GPT2, state: DecodeState) -> None:
        weights = model.weights
        self.of: dict[int, tuple[tuple[str, ...], int | None]] = {
            id(weights.lnf_w): (("final norm",), None),
            id(weights.lm_head): (("lm_head",), None),
        }
        for number, layer in enumerate(model.layers):
            for name, path in _WEIGHTS.items():
                self.of[id(layer[name])] = path, number
            self.of[id(state.cache.layers[number][0])] = CACHE, number

    def __call__(self, op: str, args: tuple) -> tuple[tuple[str, ...], int | None]:
        path, layer = next((self.of[id(a)] for a in args if id(a) in self.of), (None, None))
        if op in OPS:
            return OPS[op][0], layer
        if path is None:
            raise LookupError(f"ops.{op} reads no weight of a component: give it a place in OPS")
        return path, layer


def ops_of_step(path: EagerDecoder, state: DecodeState, context: float) -> list[Op]:
    """The ops of one step of a decode path in order, labelled and counted.

    On the GPU the step is only recorded; on NumPy it is run once.

    Parameters
    ----------
    context : float
        Tokens that each row's slot holds before a step, for the cost of attention.
    """
    places, found = _Places(path.model, state), list[Op]()

    def around(name: str, function: Any, args: tuple, options: dict[str, Any]) -> Any:
        begin = len(calls)
        result = function(*args, **options)
        launches = calls[begin:]
        if name == "norm_linear":
            found.extend(_norm_linear(places, args, options, launches))
        else:
            attends = name in ("attention_decode", "decode_step")
            given = options | ({"context": context} if attends else {})
            costs = counts.of_parts(name, args, given, max(1, len(launches)))
            fused = OPS[name][1] if name in OPS else ()
            found.append(Op(name, *places(name, args), launches, costs, fused))
        return result

    with observed(around), recorded() as calls:
        path._step(state)
    load(calls)
    return found


def _norm_linear(
    places: _Places, args: tuple, options: dict[str, Any], launches: list[Any]
) -> list[Op]:
    """A norm and a product: one op where one kernel makes both, else two."""
    x, *norm, weight, bias = (*args, None)[:6]
    product_at, norm_at = places("linear", (weight,)), places("layer_norm", tuple(norm[:2]))
    if len(launches) == 1:
        cost = counts.norm_linear(*args, **options)
        return [Op("norm_linear", *product_at, launches, [cost], fused=(norm_at[0][-1],))]
    h, rest = options["h"], {key: options.get(key) for key in ("activation", "out")}
    first = Op("layer_norm", *norm_at, launches[:1], [counts.layer_norm(x, *norm, out=h)])
    costs = counts.of_parts("linear", (h, weight, bias), rest, len(launches) - 1)
    return [first, Op("linear", *product_at, launches[1:], costs)]
