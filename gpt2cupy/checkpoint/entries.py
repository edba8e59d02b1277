"""One tensor as a file names and stores it, whatever the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from ..errors import CheckpointError

DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Entry:
    """A tensor of a file that was checked to lie inside it.

    Attributes
    ----------
    key : str
        As the file has it.
    file : Path
    offset : int
        Bytes from the file's beginning.
    dtype : str
        NumPy's name, or the format's own for what is not supported.
    shape : tuple of int
    strides : tuple of int, optional
        In elements; None is C order.
    """

    key: str
    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None = None

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype; one that is not supported raises :class:`CheckpointError`."""
        if self.dtype not in DTYPES:
            raise CheckpointError(
                f"{self.key} is of type {self.dtype}, which is not supported",
                where=str(self.file),
                remedy=f"Convert the checkpoint to one of {', '.join(DTYPES)}.",
            )
        return DTYPES[self.dtype]

    @property
    def transposed(self) -> bool:
        """Whether it lies in memory in the order of its transpose; only C and that are read."""
        if self.strides is None or self._has_strides(range(len(self.shape))):
            return False
        if len(self.shape) == 2 and self._has_strides((1, 0)):
            return True
        raise CheckpointError(
            f"{self.key} is a view with strides {list(self.strides)} for shape {list(self.shape)}",
            where=str(self.file),
            remedy="Only dense tensors and their transposes are read; "
            "call .contiguous() before saving.",
        )

    def _has_strides(self, order: range | tuple[int, int]) -> bool:
        """Whether it is dense with these dimensions from the outermost to the innermost."""
        assert self.strides is not None
        step = 1
        for dimension in reversed(order):
            if self.shape[dimension] != 1 and self.strides[dimension] != step:
                return False
            step *= self.shape[dimension]
        return True
