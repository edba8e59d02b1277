"""Weight-only int8: each weight a byte, and a scale for every 64 of a row.

``w[m, k] = values[m, k] * scales[k // 64, m]``, with the scale the largest magnitude of
the 64 divided by 127, and values rounded to nearest. Scales are bfloat16: they have
float32's range, and a product of eight bits by seven is exact in float32, so every
device that dequantises to float32 gets the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from .errors import InputError, shown

Array = Any

GROUP = 64  # weights of a row that share a scale; GROUP in cuda_src/int8.cuh
LARGEST = 127
SCALE_DTYPE = np.dtype(ml_dtypes.bfloat16)
# The arrays of Weights that are kept in int8: all matrices, and the table that a tied one reads.
MATRICES = ("wte", "qkv_w", "proj_w", "fc_w", "out_w", "lm_head")
KINDS = (None, "int8")


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A matrix [M, K] in int8 with its scales, or several stacked in front.

    Attributes
    ----------
    values : array of int8 [..., M, K]
    scales : array of bfloat16 [..., G, M]
        G = ceil(K / 64): consecutive rows lie side by side, since a kernel takes
        several rows and few groups at a time.
    """

    values: Array
    scales: Array

    def __post_init__(self) -> None:
        if self.scales.shape != scale_shape(self.values.shape):
            raise InputError(
                f"scales {list(self.scales.shape)} do not fit values {list(self.values.shape)}",
                where="QuantizedMatrix",
                remedy=f"A matrix [M, K] has scales [K / {GROUP}, M].",
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def dtype(self) -> np.dtype:
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    @property
    def device(self) -> Any:
        return self.values.device

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, layer: int) -> QuantizedMatrix:
        """One of several that are stacked."""
        if self.values.ndim < 3:
            raise IndexError("this is one matrix: take parts of its values and scales")
        return QuantizedMatrix(self.values[layer], self.scales[layer])


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the scales of matrices [..., M, K]."""
    *stacked, m, k = shape
    return (*stacked, -(-k // GROUP), m)


def check_kind(quantize: str | None) -> str | None:
    """``quantize`` if it is one of :data:`KINDS`."""
    if quantize is not None and not (isinstance(quantize, str) and quantize in KINDS):
        raise InputError(
            f"unknown quantization {shown(quantize)}",
            where="quantize",
            remedy="Use 'int8', or leave it out.",
        )
    return quantize


def quantize(matrix: np.ndarray) -> QuantizedMatrix:
    """Round a matrix [M, K] on the host to int8.

    Parameters
    ----------
    matrix : numpy.ndarray [M, K]
        Of any float dtype; rounded from float32.
    """
    m, k = matrix.shape
    values = np.empty((m, k), np.int8)
    scales = np.empty(scale_shape((m, k)), SCALE_DTYPE)
    for group in range(len(scales)):
        part = slice(group * GROUP, (group + 1) * GROUP)
        weights = matrix[:, part].astype(np.float32)
        largest = np.abs(weights).max(axis=1)
        scales[group] = (largest / np.float32(LARGEST)).astype(SCALE_DTYPE)
        scale = scales[group].astype(np.float32)
        scale[scale == 0] = 1  # weights too small for a scale are zero
        weights /= scale[:, None]
        values[:, part] = np.clip(np.rint(weights, out=weights), -LARGEST, LARGEST)
    return QuantizedMatrix(values, scales)


def dequantize(matrix: QuantizedMatrix, dtype: Any = np.float32) -> np.ndarray:
    """The values of a quantised matrix on the host, or of several: exact in float32."""
    scales = np.swapaxes(np.asarray(matrix.scales).astype(np.float32), -1, -2)
    wide = np.repeat(scales, GROUP, axis=-1)[..., : matrix.shape[-1]]
    wide *= matrix.values
    return wide.astype(dtype, copy=False)


def through_int8(
    tensors: Iterable[tuple[str, int | None, np.ndarray]],
) -> Iterator[tuple[str, int | None, np.ndarray]]:
    """The tensors of :meth:`Weights.from_tensors`, matrices with the values that int8 has."""
    for name, layer, array in tensors:
        yield name, layer, dequantize(quantize(array)) if name in MATRICES else array
