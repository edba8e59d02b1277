"""GEMV and GEMM of cuBLAS and cuBLASLt: checked calls, which can be recorded.

CuPy's wrappers refuse to run during stream capture and have no cuBLASLt, so the handles and the
workspace are ours (:mod:`.blas_device`). Algorithms are chosen once per problem and pinned
(:mod:`.blas_product`), so that the same call gives the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from ...errors import InputError
from .blas_device import COMPUTE_32F, MEMORY, OP_N, OP_T, TYPES, Handles, current_stream, handles
from .blas_device import WORKSPACE as WORKSPACE
from .blas_device import working_in as working_in
from .blas_device import workspace as workspace
from .blas_product import Product, Queued
from .device import current_device
from .tape import submit


def _check(x: Any, weight: Any, bias: Any | None, out: Any, residual: Any | None = None) -> None:
    """What launch() checks for our kernels: the library would read and write past the arrays."""
    parts = {"x": x, "weight": weight, "bias": bias, "residual": residual, "out": out}
    given = {name: array for name, array in parts.items() if array is not None}
    name = _misfit(given, len(x), len(weight))
    if name:
        seen = ", ".join(f"{part} {a.dtype.name}{list(a.shape)}" for part, a in given.items())
        raise InputError(
            f"arrays that do not fit each other: {name} in {seen}",
            where=f"linear: {name}",
            remedy="Contiguous x [N, K] and weight [M, K] of one dtype, out [N, M] of it or "
            "float32, bias [M] and residual [N, M] of out's dtype, all of one GPU.",
        )


def _misfit(given: dict[str, Any], n: int, m: int) -> str | None:
    """The name of the first array that does not fit x, or None."""
    x, out = given["x"], given["out"]
    if x.dtype.name not in TYPES:
        return "x"
    if out.dtype not in (x.dtype, np.float32):
        return "out"
    shapes = {
        "x": x.shape, "weight": (m, x.shape[1]), "bias": (m,), "residual": (n, m), "out": (n, m),
    }  # fmt: skip
    for name, array in given.items():
        wanted = {"x": x.dtype, "weight": x.dtype}.get(name, out.dtype)
        fits = array.shape == shapes[name] and array.dtype == wanted
        if not fits or not array.flags.c_contiguous:
            return name
    device = getattr(x.data, "device_id", None)
    elsewhere = (n for n, a in given.items() if getattr(a.data, "device_id", None) != device)
    return next(elsewhere, None)


def gemv(x: Any, weight: Any, out: Any) -> None:
    """``out = weight @ x`` for one row: gemv in float32, gemm_ex with one column otherwise.

    Parameters
    ----------
    x : cupy.ndarray [1, K]
    weight : cupy.ndarray [M, K]
    out : cupy.ndarray [1, M]
        Of x's dtype, or float32.
    """
    _check(x, weight, None, out)
    device = current_device()
    submit(functools.partial(_gemv, handles(device), x, weight, out))


def _gemv(own: Handles, x: Any, weight: Any, out: Any) -> None:
    with workspace():
        _queue_gemv(own, x, weight, out)


def _queue_gemv(own: Handles, x: Any, weight: Any, out: Any) -> None:
    stream = current_stream()
    if own.stream != stream:
        own.cublas.set_stream(own.handle, stream)
        own.cublas.set_workspace(own.handle, own.workspace.data.ptr, WORKSPACE)
        own.stream = stream
    m, k = weight.shape
    one, zero = own.one.ctypes.data, own.zero.ctypes.data
    if x.dtype == np.float32:
        # Rows [M, K] are a column-major [K, M] matrix: its transpose times x.
        own.cublas.sgemv(
            own.handle, OP_T, k, m, one, weight.data.ptr, k, x.data.ptr, 1, zero, out.data.ptr, 1
        )
        return
    kind = TYPES[x.dtype.name]
    own.cublas.gemm_ex(
        own.handle, OP_T, OP_N, m, 1, k, one, weight.data.ptr, kind, k, x.data.ptr, kind, k,
        zero, out.data.ptr, TYPES[out.dtype.name], m, COMPUTE_32F, -1,
    )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _product(
    device: int,
    n: int,
    m: int,
    k: int,
    kind: str,
    out_kind: str,
    epilogue: str | None,
    wide_sums: bool,
) -> Product:
    return Product(handles(device), n, m, k, kind, out_kind, epilogue, wide_sums)


def matmul(
    x: Any,
    weight: Any,
    bias: Any | None,
    out: Any,
    *,
    activation: str | None = None,
    residual: Any | None = None,
    apart: Any | None = None,
) -> None:
    """``out = activation(x @ weight.T + bias) + residual``; not both of these two.

    Parameters
    ----------
    x : cupy.ndarray [N, K]
    weight : cupy.ndarray [M, K]
        Of x's dtype.
    bias : cupy.ndarray [M], optional
        Of out's dtype.
    out : cupy.ndarray [N, M]
        Of x's dtype, or float32.
    activation : {None, "relu", "gelu_tanh"}
        What the library's epilogues have.
    residual : cupy.ndarray [N, M], optional
        Of out's dtype and layout; may be out.
    apart : cupy.ndarray, optional
        What is read later, so that out may not lie there.
    """
    _check(x, weight, bias, out, residual)
    device = current_device()
    parts = (["bias"] if bias is not None else []) + ([activation] if activation else [])
    n, k = x.shape
    kinds = x.dtype.name, out.dtype.name
    wide_sums = residual is not None and out.dtype != np.float32
    product = _product(device, n, len(weight), k, *kinds, "+".join(parts) or None, wide_sums)
    values = x, weight, bias, residual, out, MEMORY.get(), apart
    queued = Queued(product, handles(device), values)
    queued.check()
    submit(queued)
