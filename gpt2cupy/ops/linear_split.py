"""GEMM in float32 on tensor cores, by split operands: when, and with what grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from .core.cuda_source import constants
from .core.device import current_device, device_arch, sm_count
from .core.launch import Kernel, launch

Array = Any

_SPLIT = (
    "x: float32[N,K], weight: float32[M,K], bias: float32[M]?, residual: float32[N,M]?, "
    "out: float32[N,M]~, activation: int, N, M, K"
)
# By whether it multiplies by wgmma, which sm_90 alone has.
LINEAR_SPLIT = {
    True: Kernel("linear_split.cu", "linear_split", _SPLIT, overlaps=True),
    False: Kernel("linear_split.cu", "linear_split_mma", _SPLIT, overlaps=True),
}
# TF32 must be more than three times as fast as float. Chips where it is.
_CHIPS = ("sm_80", "sm_90")
_FEWEST = 33  # rows
_SHORTEST = 512  # of K; with less the library's error is smaller than that of the parts
_FULL = 0.25  # share of the multiprocessors that must have a tile


def takes_split(rows: int, weight: Array) -> bool:
    """Whether linear_split.cu is there for a GEMM of so many rows, and faster than cuBLAS."""
    k = weight.shape[1]
    if weight.dtype != np.float32 or k % 4 or k < _SHORTEST or rows < _FEWEST:
        return False
    return device_arch(current_device()) in _CHIPS and _tiles(rows, weight) > _FULL * sm_count()


def _tiles(rows: int, weight: Array) -> int:
    c = constants("linear_split.cu")
    return -(-rows // c["ROWS"]) * -(-len(weight) // c["OUTPUTS"])


def launch_split(
    weight: Array, rows: int, args: tuple[Any, ...], wgmma: bool | None = None
) -> None:
    """The GEMM; ``wgmma`` says how it is multiplied, None: as the chip can."""
    c = constants("linear_split.cu")
    if wgmma is None:
        wgmma = device_arch(current_device()) == "sm_90"
    threads, shared = ("THREADS", "STAGES_BYTES") if wgmma else ("MMA_THREADS", "MMA_BYTES")
    grid = (_tiles(rows, weight),)
    launch(LINEAR_SPLIT[wgmma], grid, (c[threads],), args, shared=c[shared])
