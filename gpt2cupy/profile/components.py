"""The parts of a decode step, and which op belongs to which: told by the weight it reads."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .. import ops
from ..decode import Decoder, DecodeState, ops_step
from ..errors import InputError, shown
from ..model import GPT2
from ..ops.core import registry
from ..ops.core.launch import is_device_array
from ..ops.core.registry import Cost
from ..ops.core.tape import load, recorded
from ..quantize import QuantizedMatrix

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
    "sampling": ("logits processors", "sampling of the token", "log-probability"),
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
# and what it covers.
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


@contextlib.contextmanager
def observed(around: Callable[[registry.Op, tuple, dict[str, Any]], Any]) -> Iterator[None]:
    """Within, every op that this thread calls goes through ``around``, a norm before its product.

    Parameters
    ----------
    around : callable(op, args, options)
        Has to call ``op(*args, **options)`` and return its result.
    """

    def see(op: registry.Op, args: tuple, options: dict[str, Any]) -> Any:
        if op is not ops.norm_linear or is_device_array(args[0]):
            return around(op, args, options)
        # On NumPy it is two ops; a kernel may be one.
        with registry.observed(see):
            return _apart(*args, **options)

    with registry.observed(see):
        yield


def _apart(
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    *product: Any,
    h: Any = None,
    shift: Any = None,
    **options: Any,
) -> Any:
    return ops.linear(ops.layer_norm(x, weight, bias, eps, out=h), *product, **options)


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


def ops_of_step(decoder: Decoder, state: DecodeState, context: float) -> list[Op]:
    """The ops of one step of a decoder in order, labelled and counted.

    On the GPU the step is only recorded; on NumPy it is run once.

    Parameters
    ----------
    context : float
        Tokens that each row's slot holds before a step, for the cost of attention.
    """
    places, found = _Places(decoder.model, state), list[Op]()

    def around(op: registry.Op, args: tuple, options: dict[str, Any]) -> Any:
        begin, name = len(calls), op.__name__
        result = op(*args, **options)
        launches = calls[begin:]
        if name == "norm_linear":
            found.extend(_norm_linear(places, args, options, launches))
        else:
            costs = costs_of(op, args, options, max(1, len(launches)), context)
            fused = OPS[name][1] if name in OPS else ()
            found.append(Op(name, *places(name, args), launches, costs, fused))
        return result

    if decoder.function is ops_step:
        decoder.model.prepare_step(state.batch)
    with observed(around), recorded() as calls:
        decoder.function(decoder.model, state)
    load(calls)
    return found


def costs_of(
    op: registry.Op, args: tuple, options: dict[str, Any], parts: int, context: float = 0.0
) -> list[Cost | None]:
    """The cost of each of the launches that an op was made of.

    A product that the library ends without our epilogue is two launches; of any
    other op with several, and of a product with a matrix in int8, which may be dequantised
    first, the whole cost stands at the first.
    """
    in_int8 = op is ops.linear and isinstance(args[1], QuantizedMatrix)
    if op is ops.linear and parts == 2 and not in_int8:
        x, weight, bias = (*args, None)[:3]
        bias, out = options.get("bias", bias), options["out"]
        epilogue = {key: options.get(key) for key in ("activation", "residual")}
        return [
            ops.linear.cost(x, weight, out=out),
            ops.bias_act.cost(out, bias, **epilogue, out=out),
        ]
    given = options | {"context": context} if "context" in op.cost.extras else options
    whole = op.cost(*args, **given) if op.cost.known else None
    return [whole, *[None] * (parts - 1)]


def _norm_linear(
    places: _Places, args: tuple, options: dict[str, Any], launches: list[Any]
) -> list[Op]:
    """A norm and a product: one op where one kernel makes both, else two."""
    x, *norm, weight, bias = (*args, None)[:6]
    product_at, norm_at = places("linear", (weight,)), places("layer_norm", tuple(norm[:2]))
    if len(launches) == 1:
        cost = ops.norm_linear.cost(*args, **options)
        return [Op("norm_linear", *product_at, launches, [cost], fused=(norm_at[0][-1],))]
    h, rest = options["h"], {key: options.get(key) for key in ("activation", "out")}
    first = Op("layer_norm", *norm_at, launches[:1], [ops.layer_norm.cost(x, *norm, out=h)])
    costs = costs_of(ops.linear, (h, weight, bias), rest, len(launches) - 1)
    return [first, Op("linear", *product_at, launches[1:], costs)]
