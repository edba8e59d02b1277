"""Token and position embedding. Kernel: cuda_src/embedding.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..quantize import QuantizedMatrix
from . import quantized, reference
from .launch import Kernel, device_empty, is_device_array, launch

Array = Any

EMBEDDING = Kernel(
    "embedding.cu",
    "embedding",
    "ids: int32[N], positions: int32[N], wte: ELEM[Vp,C], wpe: ELEM[P,C], out: float32[N,C], "
    "Vp, P, C",
)


def embedding(
    ids: Array, positions: Array, wte: Array, wpe: Array, *, out: Array | None = None
) -> Array:
    """``wte[ids] + wpe[positions]``: the start of the residual stream.

    Parameters
    ----------
    ids, positions : array of int32 [N]
        On the GPU a value outside its table gives a row of zeros.
    wte : array or QuantizedMatrix [Vp, C]
    wpe : array [P, C]
    out : array of float32 [N, C], optional

    Returns
    -------
    array of float32 [N, C]
        float64 where the tables are.
    """
    if isinstance(wte, QuantizedMatrix):
        return quantized.embedding(ids, positions, wte, wpe, out=out)
    if not is_device_array(wte):
        return reference.embedding(ids, positions, wte, wpe, out=out)
    if out is None:
        out = device_empty((len(ids), wte.shape[1]), np.float32)
    threads = min(256, -(-wte.shape[1] // 32) * 32)
    launch(EMBEDDING, (len(ids),), (threads,), (ids, positions, wte, wpe, out), elem=wte.dtype)
    return out
