"""PyTorch's pickles read as data: an interpreter of our own that runs nothing they contain.

The standard unpickler calls what a pickle names. Here a fixed list of opcodes,
those that ``torch.save`` writes for dicts of tensors, yields plain values and
two inert records. A name is looked up in a table and never imported, nothing is
called, and no attribute is set. Every other opcode or name is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

# GPT-2 XL with its optimizer takes half a megabyte and a hundred thousand opcodes. An opcode
# makes at most one object of about 100 bytes, beside the text's own bytes.
MAX_BYTES = 4 << 20
_MAX_OPCODES = 400_000
_MAX_INTEGER = 16  # bytes

_STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
}
_DICT = "collections OrderedDict"
_TENSOR = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor")
_PARAMETER = ("torch._utils _rebuild_parameter", "torch._utils _rebuild_parameter_with_state")
_NAMES = {*_STORAGES, *_TENSOR, *_PARAMETER, _DICT}


class PickleRefusedError(ValueError):
    """A pickle that is damaged, or holds what is no tensor, number, text, list or dict."""


@dataclass(frozen=True)
class Storage:
    """A block of numbers, which lies elsewhere in the file."""

    key: str
    dtype: np.dtype
    count: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage; offset and strides are in elements, and inside the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A name of the table: what REDUCE and BINPERSID compare with."""

    name: str


class _OrderedDict(dict):
    """Where torch.save hangs ``_metadata``; a plain dict in all else."""


class Reader:
    """Reads the pickle at the beginning of ``data``.

    Attributes
    ----------
    storages : dict of str to Storage
        Every storage that the pickle refers to.
    place : int
        After :meth:`read`, where the pickle ends.
    """

    def __init__(self, data: memoryview) -> None:
        self.data = data[:MAX_BYTES]
        self.place = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def read(self) -> Any:
        """The value of the pickle.

        Raises
        ------
        PickleRefusedError
            If it is damaged, or asks for anything that is not in the tables.
        """
        if bytes(self.data[:2]) != b"\x80\x02":
            raise PickleRefusedError("not a pickle of protocol 2, which torch.save writes")
        self.place = 2
        for _ in range(_MAX_OPCODES):
            code = self._take(1)[0]
            if code == ord("."):
                value = self._pop()
                if self.stack or self.marks:
                    raise PickleRefusedError("values are left over at its end")
                return value
            if code not in _OPCODES:
                raise PickleRefusedError(f"it has the opcode {_opcode(code)}")
            _OPCODES[code](self)
        raise PickleRefusedError(f"it has more than {_MAX_OPCODES} opcodes")

    # -- bytes and stack -------------------------------------------------------------------------

    def _take(self, size: int) -> memoryview:
        part = self.data[self.place : self.place + size]
        if len(part) != size:
            raise PickleRefusedError("it is cut off")
        self.place += size
        return part

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _line(self) -> str:
        for end in range(self.place, min(self.place + 200, len(self.data))):
            if self.data[end] == ord("\n"):
                return self._text(end - self.place, end + 1)
        raise PickleRefusedError("a name in it is cut off or too long")

    def _text(self, size: int, then: int | None = None) -> str:
        try:
            text = str(self._take(size), "utf-8", "surrogatepass")
        except UnicodeDecodeError as error:
            raise PickleRefusedError("a text in it is not UTF-8") from error
        self.place = self.place if then is None else then
        return text

    def _pop(self) -> Any:
        # What lies below a mark belongs to the mark.
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise PickleRefusedError("it takes more values than it gives")
        return self.stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self.marks:
            raise PickleRefusedError("it closes a list that it never opened")
        start = self.marks.pop()
        values = self.stack[start:]
        del self.stack[start:]
        return values

    def _top(self, kind: type) -> Any:
        value = self._pop()
        if not isinstance(value, kind):
            raise PickleRefusedError("it fills a value that is no list or dict")
        self.stack.append(value)
        return value

    def _recall(self, number: int) -> None:
        if number not in self.memo:
            raise PickleRefusedError("it recalls a value that it never stored")
        self.stack.append(self.memo[number])

    def _remember(self, number: int) -> None:
        value = self._pop()
        self.memo[number] = value
        self.stack.append(value)

    # -- opcodes that build ----------------------------------------------------------------------

    def _integer(self) -> None:
        size = self._take(1)[0]
        if size > _MAX_INTEGER:
            raise PickleRefusedError(f"an integer of {size} bytes")
        self.stack.append(int.from_bytes(self._take(size), "little", signed=True))

    def _tuple(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self.stack.append(tuple(reversed(values)))

    def _set_items(self, values: list[Any]) -> None:
        target = self._top(dict)
        if len(values) % 2:
            raise PickleRefusedError("a key in it has no value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Of other kinds a hash may cost anything.
            if not isinstance(key, str | int):
                raise PickleRefusedError(f"a key in it is a {type(key).__name__}")
            target[key] = value

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set_items([key, value])

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _name(self) -> None:
        name = f"{self._line()} {self._line()}"
        if name not in _NAMES:
            raise PickleRefusedError(f"it asks for {name.replace(' ', '.')!r}")
        self.stack.append(_Name(name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        name = function.name if isinstance(function, _Name) else ""
        if not isinstance(arguments, tuple):
            raise PickleRefusedError("it calls something without arguments")
        if name == _DICT and not arguments:
            self.stack.append(_OrderedDict())
        elif name in _TENSOR and 4 <= len(arguments) <= 7:
            self.stack.append(_tensor(*arguments[:4]))
        elif name in _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            self.stack.append(arguments[0])
        else:
            shown = name.replace(" ", ".") or "what is no function"
            raise PickleRefusedError(f"it calls {shown} in a way that torch.save does not")

    def _build(self) -> None:
        state, target = self._pop(), self._pop()
        known = isinstance(target, _OrderedDict) and isinstance(state, dict)
        if not known or state.keys() - {"_metadata"}:
            raise PickleRefusedError("it sets attributes")
        self.stack.append(target)

    def _storage(self) -> None:
        given = self._pop()
        if not isinstance(given, tuple) or not 5 <= len(given) <= 6 or given[0] != "storage":
            raise PickleRefusedError("it refers to something outside that is no storage")
        _, kind, key, _, count, *view = given
        dtype = _STORAGES.get(kind.name) if isinstance(kind, _Name) else None
        fits = isinstance(key, str) and _is_size(count) and view in ([], [None])
        if dtype is None or not fits:
            raise PickleRefusedError("a storage has an unknown form")
        found = Storage(key, dtype, count)
        if self.storages.setdefault(key, found) != found:
            raise PickleRefusedError(f"storage {key[:40]!r} stands twice and differs")
        self.stack.append(found)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    """The record of a tensor, which lies inside its storage."""
    sizes = shape if isinstance(shape, tuple) else (None,)
    steps = strides if isinstance(strides, tuple) else (None,)
    known = isinstance(storage, Storage) and all(map(_is_size, (offset, *sizes, *steps)))
    if not known or len(sizes) != len(steps) or len(sizes) > 8:
        raise PickleRefusedError("a tensor has an unknown form")
    last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if 0 not in sizes and last >= storage.count:
        raise PickleRefusedError("a tensor reaches outside its storage")
    return Tensor(storage, offset, sizes, steps)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _opcode(code: int) -> str:
    import pickletools

    names = {known.code: known.name for known in pickletools.opcodes}
    return names.get(chr(code), f"0x{code:02x}")


# Nothing else is read. BUILD drops the one attribute that state dicts have.
_OPCODES: dict[int, Callable[[Reader], Any]] = {
    ord("("): lambda r: r.marks.append(len(r.stack)),
    ord("}"): lambda r: r.stack.append({}),
    ord("]"): lambda r: r.stack.append([]),
    ord(")"): lambda r: r.stack.append(()),
    ord("N"): lambda r: r.stack.append(None),
    0x88: lambda r: r.stack.append(True),
    0x89: lambda r: r.stack.append(False),
    ord("J"): lambda r: r.stack.append(r._number("<i")),
    ord("K"): lambda r: r.stack.append(r._number("<B")),
    ord("M"): lambda r: r.stack.append(r._number("<H")),
    ord("G"): lambda r: r.stack.append(r._number(">d")),
    0x8A: Reader._integer,
    ord("X"): lambda r: r.stack.append(r._text(r._number("<I"))),
    ord("t"): lambda r: r.stack.append(tuple(r._pop_to_mark())),
    0x85: lambda r: r._tuple(1),
    0x86: lambda r: r._tuple(2),
    0x87: lambda r: r._tuple(3),
    ord("s"): Reader._set_item,
    ord("u"): lambda r: r._set_items(r._pop_to_mark()),
    ord("a"): Reader._append,
    ord("e"): lambda r: (lambda values: r._top(list).extend(values))(r._pop_to_mark()),
    ord("q"): lambda r: r._remember(r._number("<B")),
    ord("r"): lambda r: r._remember(r._number("<I")),
    ord("h"): lambda r: r._recall(r._number("<B")),
    ord("j"): lambda r: r._recall(r._number("<I")),
    ord("c"): Reader._name,
    ord("R"): Reader._reduce,
    ord("b"): Reader._build,
    ord("Q"): Reader._storage,
}
