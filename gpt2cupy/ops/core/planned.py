"""Ops that run the plan of an earlier call: one look-up in a dictionary in place of all checks."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from .device import current_device
from .plan import Plan, can_be_planned, keep, places_of
from .signature import array_facts
from .tape import THREAD, recorded

Array = Any


_UNPLANNED = False  # stands for a plan where a call is more than launches on its own arguments


def planned(function: Callable[..., Any], slow: Callable[..., Any]) -> Callable[..., Any]:
    """An op that runs the plan of an earlier call where there is one, and else ``slow``.

    Without an ``out`` nothing is looked up: there is an array to be made.

    Parameters
    ----------
    function : callable
        The op: nothing but launches on its arguments, where ``out`` (and ``scratch``) is given.
        What it launches follows from dtypes, shapes, layouts, scalars and the device alone.
    slow : callable
        Takes the same arguments and does the same, with all checks.
    """
    op = _Arguments(function)
    read = "".join(f"            {line}\n" for line in op.lines)
    pointers = "".join(f"pointer{number}, " for number in range(len(op.arrays)))
    outputs = ", ".join(name for name in op.arrays if name.partition("_")[0] == "out")
    text = f"""
def rebuild(function, arrays, scalars):
    return function({", ".join(op.rebuilt)})

def call({", ".join(op.header)}):
    if out is not None:
        try:
{read}
            key = (name, {", ".join(op.facts)})
            plan = THREAD.plans.get(key)
        except (AttributeError, TypeError, ValueError):
            plan = False  # no arrays of a GPU, or settings that cannot be looked up
        if plan:
            pointers = ({pointers}0)
            if (pointers in plan.checked or plan.admits(pointers)) and (
                plan.current_device() == plan.device
            ):
                plan.run(pointers)
                return {outputs}
        elif plan is None:
            arrays = ({"".join(f"{name}, " for name in op.arrays)})
            first(rebuild, key, arrays, ({"".join(f"{name}, " for name in op.scalars)}))
            return {outputs}
    return slow({", ".join(op.passed)})
"""
    scope = {
        "THREAD": THREAD,
        "name": function.__name__,
        "slow": slow,
        "first": functools.partial(_first, slow),
        **op.defaults,
    }
    exec(text, scope)
    return functools.wraps(function)(scope["call"])


class _Arguments:
    """Pieces of :func:`planned`'s text, from the parameters of an op.

    What an argument is follows from its annotation: ``Array``, ``Array | None``, ``Pair | None``
    (two arrays), or a scalar.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.header: list[str] = []  # parameters with their defaults
        self.passed: list[str] = []  # them as arguments
        self.rebuilt: list[str] = []  # the same, from all arrays and scalars
        self.arrays: list[str] = []
        self.scalars: list[str] = []
        self.lines: list[str] = []  # that read the facts
        self.facts: list[str] = []
        self.defaults: dict[str, Any] = {}
        keyword = ""
        for name, parameter in inspect.signature(function).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY and not keyword:
                self.header.append("*")
                keyword = "="
            prefix = keyword and f"{name}="
            self.passed.append(f"{prefix}{name}")
            if parameter.default is parameter.empty:
                self.header.append(name)
            else:
                self.header.append(f"{name}=default_{name}")
                self.defaults[f"default_{name}"] = parameter.default
            self.rebuilt.append(prefix + self._take(name, parameter.annotation))

    def _take(self, name: str, annotation: str) -> str:
        """Read an argument's facts; what it is, as an expression, when it is put together again."""
        if annotation == "Pair | None":
            self.lines.append(f"{name}_0, {name}_1 = {name}")
            return f"({self._array(f'{name}_0')}, {self._array(f'{name}_1')})"
        if annotation in ("Array", "Array | None"):
            return self._array(name, annotation != "Array" and name != "out")
        self.scalars.append(name)
        self.facts.append(name)
        return f"scalars[{len(self.scalars) - 1}]"

    def _array(self, name: str, optional: bool = False) -> str:
        lines, facts = array_facts(name, len(self.arrays), optional)
        self.lines += lines
        self.facts += facts
        self.arrays.append(name)
        return f"arrays[{len(self.arrays) - 1}]"


def _first(
    slow: Callable[..., Any],
    rebuild: Callable[..., Any],
    key: Any,
    arrays: tuple[Array | None, ...],
    scalars: tuple[Any, ...],
) -> None:
    """Run a call with all checks, and keep its plan."""
    plans = THREAD.plans
    if not isinstance(plans, dict):  # its launches are recorded, or its ops observed
        rebuild(slow, arrays, scalars)
        return
    # An array that is given twice stands for two: the next call may have different ones.
    distinct = [
        each.view() if any(each is other for other in arrays[:place]) and each is not None else each
        for place, each in enumerate(arrays)
    ]
    with recorded() as calls:
        rebuild(slow, distinct, scalars)
    for call in calls:
        call()
    plan: Any = _UNPLANNED
    if all(map(can_be_planned, calls)):
        launches: Any = calls
        places = places_of(launches, distinct)
        if places is not None:
            plan = Plan(launches, places, len(distinct) + 1, current_device())
    keep(plans, key, plan)
