"""What an op takes, declared once: checked before NumPy or a kernel gets it, alike for both.

An op declares its arguments at its decorator::

    @op(reference="...", takes="x: @weight|float32[*N,C], weight: real[C]?, eps: positive, "
        "out: @weight,x[*N,C]~")

An array is ``dtypes[dims]marks``. Dtypes are alternatives: ``real`` (float32, float16, bfloat16,
and float64 on NumPy), ``quantized`` (a :class:`gpt2cupy.quantize.QuantizedMatrix`), ``@a,b`` (that
of the first of these arguments that is given), or a name of NumPy's; ``@a;...`` is that of ``a``
where it is given, else what follows. A letter of the dims is bound by the first array that has it;
``*N`` stands for any leading dimensions. Marks: ``?`` for one that may be None; of an array that is
written, ``!`` where it shares no memory with another, ``!a`` where it may be the very array ``a``,
``~`` where it may be any of the same dims. ``out.0`` and ``out.1`` are the two of a pair.

Else it is ``number``, ``positive`` (a number from 0), ``int``, ``bool``, ``any``, or words of which
it must be one, as ``none|tanh``; with ``?`` it may be None.

Layout, alignment and device are what a kernel takes, and :func:`.launch` checks them.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ...errors import InputError, kind_of, shown
from ...quantize import QuantizedMatrix
from .launch import is_device_array

Array = Any

_KNOWN = 4096  # kinds of calls that an op remembers as checked
_TRIES = 100_000  # of NumPy, to find a number that two strided arrays both address
_REAL = [np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16)]
_COPY = "Nothing is copied, cast or broadcast silently: convert or copy it first."
_ARRAY = re.compile(r"([\w@|,;]+)\[([*\w,]*)\](\??)([!~]?)(\w*)$")
_NUMBERS = {
    "number": "a finite number",
    "positive": "a finite number, 0 or more",
    "int": "an integer of 64 bits",
    "bool": "True or False",
}


class _Argument(NamedTuple):
    """One argument of an op, or one array of a pair."""

    name: str
    kinds: str  # dtypes of an array, or what else it may be
    dims: tuple[str, ...] | None  # None: no array
    optional: bool
    written: bool
    same: str  # which array it may be itself: a name, "*" for any of its dims, "" for none


class Contract:
    """Checks the arguments of an op.

    Parameters
    ----------
    function : callable
        The op.
    text : str
        Its arguments, as the module's docstring shows them.

    Attributes
    ----------
    check : callable
        Takes the op's own arguments. A call of dtypes, shapes and settings that were checked
        before costs a look-up, beside the memory of what is written.

    Raises
    ------
    InputError
        From ``check``; ``where`` is the op and the argument.
    """

    def __init__(self, function: Callable[..., Any], text: str) -> None:
        self.op = function.__name__
        self.arguments = [_parsed(part) for part in re.split(r",\s+(?=[\w.]+: )", text)]
        self._known: set[Any] = set()
        signature = inspect.signature(function)
        declared = {each.name.partition(".")[0] for each in self.arguments}
        assert declared == set(signature.parameters), (self.op, declared)
        self.check: Callable[..., None] = self._compiled(signature)

    def _compiled(self, signature: inspect.Signature) -> Callable[..., None]:
        """The check, written out for the arguments, since it runs at every call."""
        facts = []
        for each in self.arguments:
            if each.dims is not None and "." not in each.name:
                known = f"{each.name}.shape, {each.name}.dtype, {each.name}.__class__"
                if "quantized" in each.kinds:  # where its values are
                    known += f", getattr({each.name}, 'values', None).__class__"
                known = f"({known})"
                absent = f"None if {each.name} is None else " if each.optional else ""
                facts.append(f"{absent}{known}")
            elif each.name.endswith(".0"):
                pair = each.name[:-2]
                facts.append(f"None if {pair} is None else tuple(map(facts, {pair}))")
        for each in self.arguments:
            if each.dims is None and each.kinds != "any":
                value = each.name
                if each.kinds == "int" and not each.optional:  # seeds differ from call to call
                    value = f"-(2**63) <= {each.name} < 2**64"
                facts.append(f"{value}, {each.name}.__class__")
        plain = [
            p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()
        ]
        header = str(signature.replace(parameters=plain, return_annotation=inspect.Parameter.empty))
        values = ", ".join(f"{name!r}: {name}" for name in signature.parameters)
        suspect = " or ".join(self._suspicions()) or "False"
        pairs = "".join(
            f"    {name}_0, {name}_1 = {name} or (None, None)\n"
            for name in dict.fromkeys(a.name[:-2] for a in self.arguments if "." in a.name)
        )
        text = f"""
def {self.op}{header}:
    try:
        key = ({", ".join(facts)},)
        new = key not in known
    except (AttributeError, TypeError, ValueError):
        new, key = True, None
    if new:
        full({{{values}}}, key)
{pairs}
    if {suspect}:
        memory({{{values}}})
"""
        scope: dict[str, Any] = {
            "known": self._known,
            "full": self._full,
            "memory": self._memory,
            "facts": _facts,
            "ndarray": np.ndarray,
            "share": np.may_share_memory,
        }
        exec(text, scope)
        return scope[self.op]

    def _suspicions(self) -> Iterator[str]:
        """For each array that is written: when its memory has to be looked at, as an expression."""
        arrays = [each for each in self.arguments if each.dims is not None]
        for each in arrays:
            if not each.written:
                continue
            name, others = each.name.replace(".", "_"), []
            for other in arrays:
                if other is each:
                    continue
                theirs = other.name.replace(".", "_")
                values = theirs
                if "quantized" in other.kinds:
                    values = f"getattr({theirs}, 'values', {theirs})"
                meets = f"share({name}, {values})"
                if other.optional:
                    meets = f"({theirs} is not None and {meets})"
                if not other.written and _may_be_one(each, other):
                    meets = f"({theirs} is not {name} and {meets})"
                others.append(meets)
            bad = f"0 in {name}.strides or not {name}.flags.writeable"
            yield f"(isinstance({name}, ndarray) and ({' or '.join([bad, *others])}))"

    def _values(self, given: dict[str, Any]) -> Iterator[tuple[_Argument, Any]]:
        """Each declared argument with its value, both of a pair."""
        for each in self.arguments:
            name, _, place = each.name.partition(".")
            value = given[name]
            if place and value is not None:
                if not isinstance(value, (tuple, list)) or len(value) != 2:
                    raise self._error(name, value, "a pair of arrays", "Give (y, total).")
                value = value[int(place)]
            yield each, value

    def _full(self, given: dict[str, Any], key: Any) -> None:
        values = dict(self._values(given))
        arrays = {each.name: v for each, v in values.items() if each.dims is not None}
        memory: bool | None = None  # whether the first array is on a GPU
        for each, value in values.items():
            if value is None and each.optional:
                continue
            if each.dims is None:
                self._check_setting(each, value)
                continue
            of = value.values if isinstance(value, QuantizedMatrix) else value
            on_gpu = is_device_array(of)
            quantized = of is not value
            if not (on_gpu or isinstance(of, np.ndarray)) or (
                quantized and "quantized" not in each.kinds
            ):
                remedy = "gpt2cupy.torch takes PyTorch's tensors; nothing is copied silently."
                raise self._error(each.name, value, "an array of NumPy or CuPy", remedy)
            if memory is not None and on_gpu != memory:
                what = "an array on the GPU" if memory else "an array of NumPy"
                remedy = "Nothing is copied silently: give all arrays in one memory."
                raise self._error(each.name, value, what, remedy)
            memory = on_gpu
        bound: dict[str, Any] = {}
        for each in self.arguments:
            if (array := arrays.get(each.name)) is not None:
                self._check_array(each, array, arrays, bound, on_gpu=bool(memory))
        if key is not None:
            if len(self._known) >= _KNOWN:
                self._known.clear()
            self._known.add(key)

    def _check_array(
        self,
        each: _Argument,
        array: Array,
        arrays: dict[str, Any],
        bound: dict[str, Any],
        *,
        on_gpu: bool,
    ) -> None:
        assert each.dims is not None
        allowed: list[np.dtype] = []
        first, _, others = each.kinds.rpartition(";")  # "@a" where there is one
        chosen = first if first and arrays[first[1:]] is not None else others
        for kind in chosen.split("|"):
            names = kind[1:].split(",") if kind.startswith("@") else []
            like = next((arrays[name] for name in names if arrays[name] is not None), None)
            if like is not None:
                allowed.append(like.dtype)
            elif kind == "real" or names:
                allowed += _REAL if on_gpu else [*_REAL, np.dtype(np.float64)]
            elif kind != "quantized":
                allowed.append(np.dtype(kind))
        shape, dims = array.shape, each.dims
        leads = bool(dims) and dims[0].startswith("*")
        kept = len(dims) - leads
        fits = array.dtype in allowed or isinstance(array, QuantizedMatrix)
        fits = fits and (len(shape) >= kept if leads else len(shape) == kept)
        if fits:
            sizes = [shape[: len(shape) - kept], *shape[len(shape) - kept :]] if leads else shape
            fits = all(
                size == (int(dim) if dim.isdigit() else bound.setdefault(dim, size))
                for dim, size in zip(dims, sizes, strict=True)
            )
        if not fits:
            shown_dims: list[str] = []
            for dim in dims:
                known = bound.get(dim, "..." if dim.startswith("*") else dim)
                shown_dims += map(str, known if isinstance(known, tuple) else [known])
            kinds = " or ".join(dict.fromkeys(dtype.name for dtype in allowed))
            raise InputError(
                f"{each.name} is {array.dtype.name}{list(shape)}, not {kinds}"
                f"[{', '.join(shown_dims)}]",
                where=f"{self.op}: {each.name}",
                remedy=_COPY,
            )

    def _check_setting(self, each: _Argument, value: Any) -> None:
        kind, words = each.kinds, each.kinds.split("|")
        if kind == "any":
            return
        flag = isinstance(value, (bool, np.bool_))
        whole = isinstance(value, (int, np.integer)) and not flag
        if kind == "bool":
            fits = flag
        elif kind == "int":
            fits = whole and -(2**63) <= value < 2**64
        elif kind in _NUMBERS:
            fits = whole or (isinstance(value, (float, np.floating)) and math.isfinite(value))
            fits = fits and abs(value) <= np.finfo(np.float32).max
            fits = fits and (value >= 0 or kind == "number")
        else:
            fits = isinstance(value, str) and value in words
        if not fits:
            allowed = _NUMBERS.get(kind, f"one of {', '.join(map(repr, words))}")
            more = ", or None" if each.optional else ""
            raise InputError(
                f"{each.name}={shown(value)} is impossible",
                where=f"{self.op}: {each.name}",
                remedy=f"It must be {allowed}{more}.",
            )

    def _memory(self, given: dict[str, Any]) -> None:
        """Refuse what is written where something else lies; of a GPU :func:`.launch` does."""
        values = [(each, v) for each, v in self._values(given) if each.dims and v is not None]
        for each, target in values:
            if not each.written or not isinstance(target, np.ndarray):
                continue
            if not target.flags.writeable:
                raise self._error(each.name, "read-only", "", "Give an array that may be written.")
            strides = zip(target.shape, target.strides, strict=True)
            if target.size and any(n > 1 and not s for n, s in strides):
                raise self._error(
                    each.name, "an array whose elements share memory", "",
                    "Give an output whose elements have memory of their own.",
                )  # fmt: skip
            for other, array in values:
                of = array.values if isinstance(array, QuantizedMatrix) else array
                if other is each or not np.may_share_memory(target, of):
                    continue
                alone = other.written or not _may_be_one(each, other)
                if (alone or not _are_one(target, of)) and _meet(target, of):
                    raise InputError(
                        f"{each.name} shares memory with {other.name}",
                        where=f"{self.op}: {each.name}",
                        remedy="Give an output memory of its own, or, where the op works in "
                        "place, the very same array.",
                    )

    def _error(self, name: str, value: Any, expected: str, remedy: str) -> InputError:
        found = value if not expected else kind_of(value)
        if expected and type(value).__module__ != "builtins":  # which of several kinds of arrays
            found = f"a {type(value).__module__}.{type(value).__qualname__}"
        what = f"{name} is {found}" + (f", not {expected}" if expected else "")
        return InputError(what, where=f"{self.op}: {name}", remedy=remedy)


def _parsed(part: str) -> _Argument:
    name, _, kind = part.partition(": ")
    if match := _ARRAY.match(kind):
        dtypes, dims, optional, mark, same = match.groups()
        return _Argument(
            name,
            dtypes,
            tuple(dims.split(",")),
            bool(optional) or bool(mark),
            bool(mark),
            "*" if mark == "~" else same,
        )
    return _Argument(name, kind.removesuffix("?"), None, kind.endswith("?"), False, "")


def _may_be_one(written: _Argument, other: _Argument) -> bool:
    """Whether an output may be the very array of another argument."""
    return written.same == other.name or (written.same == "*" and written.dims == other.dims)


def _facts(array: Array | None) -> Any:
    return None if array is None else (array.shape, array.dtype, array.__class__)


def _are_one(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two are one array, or views of all of the same."""
    start = [array.__array_interface__["data"][0] for array in (a, b)]
    return start[0] == start[1] and (a.shape, a.strides, a.dtype) == (b.shape, b.strides, b.dtype)


def _meet(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have an element in common."""
    try:
        return np.shares_memory(a, b, max_work=_TRIES)  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True
