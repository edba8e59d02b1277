"""What the device reaches, measured in the same run: the two lines of the roofline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import ops
from ..model import GPT2
from ..timing import Timing, device_times, host_times


@dataclass(frozen=True)
class Limits:
    """What this device reaches: bytes/s of a copy (read and written) and FLOP/s of a GEMM."""

    copy_bytes_per_s: float
    product_flops_per_s: float
    copy_bytes: int
    product_size: int


def limits(model: GPT2) -> Limits:
    """Measure a large copy and a large GEMM of the model's dtype on its device."""
    size, copy = _copy(model.xp)
    n = 1024 if model.xp is np else 4096
    # Zeros would be multiplied faster than a model's weights.
    values = np.random.default_rng(0).standard_normal((n, n), np.float32).astype(model.dtype)
    x, out = model.xp.asarray(values), model.xp.empty((n, n), model.dtype)
    if model.xp is np:
        product = host_times(lambda: np.matmul(x, x.T, out=out), warmup=2, runs=9)
    else:
        product = device_times(lambda: ops.linear(x, x, out=out, backend="cublas"), runs=9)
    rates = 2 * size / copy.median_us * 1e6, 2 * n**3 / product.median_us * 1e6
    return Limits(*rates, size, n)


def _copy(xp: Any) -> tuple[int, Timing]:
    """Bytes of a copy on the device, and its time."""
    if xp is np:
        size = 64 << 20
        source, target = np.ones(size, np.uint8), np.zeros(size, np.uint8)
        return size, host_times(lambda: np.copyto(target, source), warmup=2, runs=9)
    free, _ = xp.cuda.runtime.memGetInfo()
    size = min(1 << 30, free // 8) & ~255
    source, target = xp.zeros(size, np.uint8), xp.zeros(size, np.uint8)
    stream = xp.cuda.get_current_stream().ptr
    device_to_device = 3

    def copy() -> None:
        xp.cuda.runtime.memcpyAsync(
            target.data.ptr, source.data.ptr, size, device_to_device, stream
        )

    return size, device_times(copy, runs=9)
