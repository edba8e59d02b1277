"""@op: what is said about an op once, at its function: the NumPy oracle, and what it must do.

An op is declared where its kernel is launched::

    def _cost(x, weight, bias, out):
        return Cost(moved(x, weight, bias) + written(out, x.size, weight.dtype), 8 * x.size)

    @op(reference="reference.layer_norm", cost=_cost)
    def layer_norm(x, weight, bias, eps=1e-5, *, out=None):
        ...  # launches the kernel

An array of NumPy in its first argument goes to the oracle, one of CuPy to the function itself.
``layer_norm.reference`` is the oracle and ``layer_norm.cost`` the bytes and operations; both take
the op's own arguments. Within :func:`observed` every op that is called goes through a callback.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar, cast

import numpy as np

from ...errors import Gpt2CupyError, InputError, kind_of
from .contract import Contract
from .launch import is_device_array
from .planned import planned
from .tape import without_plans

Array = Any
P = ParamSpec("P")
R_co = TypeVar("R_co", covariant=True)
R = TypeVar("R")

_PACKAGE = "gpt2cupy.ops"


class Cost(NamedTuple):
    """What an op has to do: bytes to move and operations to make.

    Bytes count each input once and each output once, as if caches held everything in between;
    operations count a multiplication and an addition as two. Both are lower bounds: a kernel
    that moves more is slow for a reason, and that is what the comparison is for.
    """

    bytes: float
    flops: float


def moved(*arrays: Array | None) -> int:
    """Bytes of those arrays that are given."""
    return sum(array.nbytes for array in arrays if array is not None)


def written(out: Array | None, size: int, dtype: Any) -> int:
    """Bytes of ``out``; without it, of the array [size] that the op makes."""
    return size * np.dtype(dtype).itemsize if out is None else out.nbytes


class Reference:
    """The NumPy function of an op; its module is imported when it is first needed."""

    def __init__(self, where: str) -> None:
        self.module, _, self.name = where.rpartition(".")

    @functools.cached_property
    def function(self) -> Callable[..., Any]:
        return getattr(importlib.import_module(f"{_PACKAGE}.{self.module}"), self.name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.function(*args, **options)


class Counter:
    """Counts what a call of an op has to do.

    Attributes
    ----------
    known : bool
        Whether the op says what it costs; if not, asking is an error.
    extras : set of str
        What it must be told beside the op's own arguments.
    """

    def __init__(self, function: Callable[..., Any], cost: Callable[..., Cost] | None) -> None:
        self.known = cost is not None
        self._cost = cost or functools.partial(_unknown, function.__name__)
        self._signature = inspect.signature(function)
        self._names = inspect.signature(self._cost).parameters.keys()
        self.extras = self._names - self._signature.parameters.keys()

    def __call__(self, *args: Any, **options: Any) -> Cost:
        extras = {name: options.pop(name) for name in self.extras & options.keys()}
        bound = self._signature.bind(*args, **options)
        bound.apply_defaults()
        given = bound.arguments | extras
        return self._cost(**{name: given[name] for name in self._names & given.keys()})


def _unknown(name: str) -> Cost:
    raise LookupError(f"ops.{name} does not say what it costs: @op(cost=...)")


class Op(Protocol[P, R_co]):
    """A function of :mod:`gpt2cupy.ops` and what is known about it."""

    __name__: str
    reference: Reference | None
    cost: Counter

    def __call__(self, *args: P.args, **options: P.kwargs) -> R_co: ...


# The ops of the modules that are imported, by name.
registered: dict[str, Op] = {}
# The types of arrays on a GPU that were seen: CuPy's, once there was one.
_device_types: set[type] = set()
# By thread: what sees the ops that it calls.
_observers: dict[int, Callable[[Op, tuple, dict[str, Any]], Any]] = {}


def op(
    *,
    reference: str | None,
    cost: Callable[..., Cost] | None = None,
    takes: str | None = None,
    check: Callable[..., None] | None = None,
    of_models: bool = False,
    only_launches: bool = False,
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Declare a function as an op.

    Parameters
    ----------
    reference : str or None
        Module of ops and function in it that computes the same on NumPy, with the same
        parameters. None for what a GPU alone has.
    cost : callable, optional
        Takes those of the op's parameters that it names and gives a :class:`Cost`. What else
        it names must be given to ``.cost`` as well.
    takes : str, optional
        Its arguments, as contract.py explains: they are checked before NumPy or the kernel gets
        them.
    check : callable, optional
        Takes the op's own arguments, after that check, and raises for what it cannot say.
    of_models : bool
        Whether models alone are to call it, at every step: its arguments are then checked when
        something has failed, to say what.
    only_launches : bool
        Whether the op, given an ``out``, does nothing but launch kernels on its own arguments:
        then a call is found again as a whole (plan.py).
    """

    def declare(function: Callable[P, R]) -> Op[P, R]:
        oracle = None if reference is None else Reference(reference)
        first = next(iter(inspect.signature(function).parameters))
        contract = None if takes is None else Contract(function, takes).check
        before = None if of_models else contract
        ident, on_host = threading.get_ident, np.ndarray

        @functools.wraps(function)
        def call(*args: Any, **options: Any) -> Any:
            if _observers and (observer := _observers.pop(thread := ident(), None)):
                try:  # what the op calls is a part of it, and not seen
                    return observer(made, args, options)
                finally:
                    _observers[thread] = observer
            if before is not None:
                before(*args, **options)
            array = args[0] if args else options.get(first)
            kind = type(array)
            target: Any = function
            if not (kind in _device_types or (kind is not on_host and _on_device(array))):
                if oracle is not None:
                    target = oracle.function
                elif contract is not None:
                    raise InputError(
                        f"{first} is {kind_of(array)}, and {function.__name__} is for a GPU alone",
                        where=f"{function.__name__}: {first}",
                        remedy="Give arrays of CuPy.",
                    )
            try:
                if check is not None:
                    check(*args, **options)
                return target(*args, **options)
            except Gpt2CupyError:
                raise
            except Exception as error:
                if not of_models or contract is None:
                    raise
                contract(*args, **options)
                # By their type device_errors tells a full GPU from a failed one.
                if target is function or isinstance(error, MemoryError):
                    raise
                raise Gpt2CupyError(  # numbers in its arrays, or a bug
                    f"{function.__name__} failed: {type(error).__name__}: {error}"[:400],
                    where=f"ops.{function.__name__}",
                    remedy="Look at the cause of this error, and at the values of the arguments.",
                ) from error

        made = cast(Op, planned(function, call) if only_launches else call)
        made.reference = oracle
        made.cost = Counter(function, cost)
        registered[function.__name__] = made
        return made

    return declare


def _on_device(array: Any) -> bool:
    """Whether an array, or a matrix in int8, lies on a GPU."""
    if is_device_array(array):
        _device_types.add(type(array))
        return True
    return is_device_array(getattr(array, "values", None))


@contextlib.contextmanager
def observed(callback: Callable[[Op, tuple, dict[str, Any]], Any]) -> Iterator[None]:
    """Within, every op that this thread calls goes through ``callback``.

    Ops that an op calls are a part of it, and those that the callback calls are not seen
    either, unless it opens another :func:`observed`.

    Parameters
    ----------
    callback : callable(op, args, options)
        Its result is that of the call: it has to return ``op(*args, **options)``, or
        something in its place.
    """
    thread = threading.get_ident()
    before = _observers.get(thread)
    _observers[thread] = callback
    try:
        with without_plans():
            yield
    finally:
        if before is None:
            _observers.pop(thread, None)
        else:
            _observers[thread] = before
