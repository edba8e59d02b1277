"""A tensor as it lies in a file, and the mapped views that loading is made of."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..files import open_plain


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes
    ----------
    name, layer : str, int or None
        The attribute of ``Weights`` and the layer it belongs to.
    file : Path
    offset : int
        Bytes from the file's beginning.
    dtype : numpy.dtype
    shape : tuple of int
        As stored.
    transposed : bool
        Stored as [in, out].
    """

    name: str
    layer: int | None
    file: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    transposed: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def read_dtype(self) -> np.dtype:
        """What :func:`views` gives: float64, which no device computes in, is rounded."""
        return np.dtype(np.float32) if self.dtype == np.float64 else self.dtype

    def view(self, data: np.ndarray) -> np.ndarray:
        """The values in rows [out, in], without a copy, from the bytes of the whole file."""
        array = data[self.offset : self.offset + self.nbytes].view(self.dtype).reshape(self.shape)
        return array.T if self.transposed else array


def map_file(path: Path) -> np.ndarray:
    """The bytes of a file as a read-only array; pages are read when they are touched."""
    try:
        with open_plain(path) as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def views(tensors: Iterable[StoredTensor]) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """(name, layer, array) of each tensor; every file is mapped once."""
    mapped: dict[Path, np.ndarray] = {}
    for tensor in tensors:
        if tensor.file not in mapped:
            mapped[tensor.file] = map_file(tensor.file)
        array = tensor.view(mapped[tensor.file])
        if array.dtype != tensor.read_dtype:
            with np.errstate(over="ignore"):  # an infinite value is found by check_finite
                array = array.astype(tensor.read_dtype)
        yield tensor.name, tensor.layer, array


def check_finite(name: str, layer: int | None, array: np.ndarray) -> None:
    """Raise if any value is NaN or infinite; makes no copy and no temporary array.

    Read as integers, floats that are not finite are the largest of either sign:
    two maxima of integers find them at the speed of memory, in every dtype.

    Raises
    ------
    CheckpointError
        Naming the tensor.
    """
    infinity = {"float32": 0x7F800000, "float16": 0x7C00, "bfloat16": 0x7F80}[array.dtype.name]
    size = array.dtype.itemsize
    sign = 1 << 8 * size - 1
    rows = array if array.flags.c_contiguous else array.T
    if rows.view(f"i{size}").max() >= infinity or rows.view(f"u{size}").max() >= sign | infinity:
        raise CheckpointError(
            "the weights hold NaN or infinite values",
            where=name if layer is None else f"{name} of layer {layer}",
            remedy="The checkpoint is damaged or its training diverged; take another one.",
        )


def exists(path: Path) -> bool:
    """Whether there is something of that name; a name out of reach raises."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise unreadable(path, error) from error
    return True


def unreadable(path: Path, error: Exception) -> CheckpointError:
    """The error for a file or folder that the system does not let us read."""
    return CheckpointError(
        f"cannot read it: {getattr(error, 'strerror', None) or error}",
        where=str(path),
        remedy="Check that it exists and that you may read it.",
    )
