"""Find the first op at which a decode path leaves eager.

Both run the first op of one decode step from the same state, then the first two,
and so on; ops that are left out do nothing. After each run every array that a step
writes is compared. A graph is captured again for each prefix of the step.

    python tools/bisect_step.py --model gpt2 --dtype float16 --path graph --position 200
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2cupy import GPT2, decode
from gpt2cupy.decode import Decoder, DecodeState
from gpt2cupy.errors import Gpt2CupyError, InputError
from gpt2cupy.ops.core import registry
from gpt2cupy.validate import random_ids, runs

# Of the workspace. Not h: fused kernels do not write it, and what is made of it follows at once.
ACTIVATIONS = ("x", "qkv", "attended", "inner")
CHOSEN = ("ids", "positions", "steps")  # what the choice of the next token writes
MakeDecoder = Callable[[], Decoder]


@dataclass(frozen=True)
class Op:
    """One op of a step, in the order in which they run."""

    index: int
    name: str
    layer: int | None  # None before the first layer and after the last
    writes: str  # the array that its ``out`` is

    def __str__(self) -> str:
        place = "" if self.layer is None else f"layer {self.layer}, "
        return f"op {self.index}: {place}{self.name} -> {self.writes}"


@dataclass(frozen=True)
class Departure:
    """The first op after which arrays differ: how much, by array."""

    op: Op
    differences: dict[str, float]


@contextlib.contextmanager
def first_ops(count: int, state: DecodeState) -> Iterator[list[Op]]:
    """Let only the first ``count`` ops of a step run; yields the list of all that it asks for."""
    asked: list[Op] = []

    def limited(op: registry.Op, args: tuple, options: dict[str, Any]) -> Any:
        asked.append(_describe(op.__name__, options.get("out"), state, asked))
        return op(*args, **options) if len(asked) <= count else options.get("out")

    with registry.observed(limited):
        yield asked


def _describe(name: str, out: Any, state: DecodeState, before: list[Op]) -> Op:
    arrays = {key: getattr(state.work, key) for key in ACTIVATIONS} | {"logits": state.logits}
    writes = next((key for key, array in arrays.items() if array is out), "next token")
    layer = before[-1].layer if before else None
    if writes == "qkv":
        layer = 0 if layer is None else layer + 1
    if writes in ("logits", "next token"):
        layer = None
    return Op(len(before), name, layer, writes)


class Bench:
    """One decoder's state before a step, and what the first ops of the step make of it.

    Parameters
    ----------
    make : callable
        Gives a new decoder; one is made for each prefix, for decoders keep what
        they prepared.
    ids : array of int32 [B, T]
        The last token of each row is the step; those before it fill the cache.
    """

    def __init__(self, make: MakeDecoder, ids: np.ndarray) -> None:
        self.make = make
        self.ids = ids
        model = make().model
        with runs.on_device(model):
            model.prepare_step(len(ids))  # once for a model: no op of a step
            self.state = runs.start(model, ids, ids.shape[1] - 1)
            cache = self.state.cache
            # As bytes, which can be copied whatever the dtype.
            kept = [a.view(np.uint8) for a in (cache.k, cache.v, self.state.steps)]
            self.before = [(array, array.copy()) for array in kept]
            runs.host(self.state.steps)  # waits: the next run is on another stream

    def after(self, count: int) -> tuple[dict[str, np.ndarray], list[Op]]:
        """Host copies of every array after the first ``count`` ops; and all ops of the step."""
        state, decoder = self.state, self.make()
        with runs.on_device(decoder.model):
            for array, saved in self.before:
                array[...] = saved
            arrays = {name: getattr(state.work, name) for name in ACTIVATIONS}
            for array in (*arrays.values(), state.logits, state.scratch):
                array.fill(0)
            runs.feed(state, self.ids[:, -1], self.ids.shape[1] - 1)
            with first_ops(count, state) as asked:
                decoder.prepare(state)
                prepared = list(asked)
                decoder.step(state)
            arrays |= {"logits": state.logits, "k": state.cache.k, "v": state.cache.v}
            arrays |= {name: getattr(state, name) for name in CHOSEN}
            # On a GPU the ops are asked for once, when the step is prepared.
            return {n: runs.host(a).copy() for n, a in arrays.items()}, prepared or asked


def bisect(
    eager: MakeDecoder, other: MakeDecoder, ids: np.ndarray, *, tolerance: float = 0.0
) -> tuple[Departure | None, int]:
    """The first op after which the other decoder's arrays differ, and how many ops a step has.

    Parameters
    ----------
    eager, other : callable
        Give a new decoder.
    ids : array of int32 [B, T]
        Tokens in the cache, and in the last column those of the step.
    tolerance : float
        Difference allowed, relative to the largest value of the array; 0 asks
        for the same bits.

    Raises
    ------
    InputError
        If the other decoder's step does not consist of eager's ops.
    """
    left, right = Bench(eager, ids), Bench(other, ids)
    steps = left.after(0)[1]
    if [op.name for op in right.after(0)[1]] != [op.name for op in steps]:
        raise InputError(
            "the steps of the two paths do not consist of the same ops",
            where="bisect_step",
            remedy="Compare their logits with: gpt2cupy validate --path NAME.",
        )
    for count in range(len(steps) + 1):
        ours, theirs = left.after(count)[0], right.after(count)[0]
        found = {
            name: difference
            for name in ours
            if (difference := relative(theirs[name], ours[name])) > tolerance
        }
        if found:
            start = Op(-1, "nothing run yet", None, "the state")
            return Departure(steps[count - 1] if count else start, found), len(steps)
    return None, len(steps)


def relative(value: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the largest finite reference value; inf where NaN or inf differ."""
    if np.array_equal(value, reference, equal_nan=value.dtype.kind not in "iu"):
        return 0.0
    wide, exact = value.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore"):
        difference = np.abs(wide - exact)
    same = (wide == exact) | (np.isnan(wide) & np.isnan(exact))
    difference = np.where(same, 0.0, difference)
    if not np.isfinite(difference).all():
        return float("inf")
    scale = float(np.abs(exact[np.isfinite(exact)]).max(initial=0.0)) or 1.0
    return float(difference.max()) / scale


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", "-m", default="shakespeare")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--path", default="auto", help="the decode path compared with eager")
    parser.add_argument("--gemv", default="ours", help="the other path's one-row product")
    parser.add_argument("--position", type=int, default=20, help="position of the step")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tolerance", type=float, default=0.0, help="relative; 0 = same bits")
    args = parser.parse_args()
    try:
        model = GPT2.from_pretrained(args.model, dtype=args.dtype, device=args.device)
        other = GPT2(model.config, model.weights, gemv=args.gemv)
        name = decode.decoder(other, args.path).name
        if name == "eager" and (model.xp is np or other.gemv == model.gemv):
            raise InputError(
                f"there is nothing to compare: both paths are {name}",
                where=f"--path {args.path}, --device {args.device}",
                remedy="Name another path or --gemv, on a GPU.",
            )
        ids = random_ids(model, args.batch, args.position + 1, args.seed)
        departure, count = bisect(
            lambda: decode.decoder(model, "eager"),
            lambda: decode.decoder(other, args.path),
            ids,
            tolerance=args.tolerance,
        )
    except Gpt2CupyError as error:
        print(f"bisect_step: {error}", file=sys.stderr)
        return 2
    if departure is None:
        print(f"{name} does not leave eager in any of the {count} ops of the step")
        return 0
    print(f"{name} leaves eager at {departure.op} (of {count})")
    for array, difference in departure.differences.items():
        print(f"  {array:<10} differs by {difference:.3e} of its largest value")
    return 1


if __name__ == "__main__":
    sys.exit(main())
