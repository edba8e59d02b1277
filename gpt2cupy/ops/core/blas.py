"""cuBLAS and cuBLASLt through NVIDIA's own bindings: the only place that touches them.

CuPy's wrappers refuse to run during stream capture and have no cuBLASLt, so the
handles and the workspace here are ours. Algorithms are chosen once per problem
and pinned, so that the same call gives the same bits. Streams of one GPU share the
workspace: one waits for the other, whichever threads they come from.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

import numpy as np

from ...errors import DeviceError, InputError
from .device import current_device
from .tape import submit

WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper, ample elsewhere

# cudaDataType and cublasComputeType_t
_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
_COMPUTE_32F = 68
_OP_N, _OP_T = 0, 1
_EPILOGUES = {None: 1, "relu": 2, "bias": 4, "bias+relu": 6, "gelu_tanh": 32, "bias+gelu_tanh": 36}


def _bindings() -> Any:
    try:
        from nvmath.bindings import cublas, cublasLt
    except ImportError as error:
        raise DeviceError(
            "nvmath-python, NVIDIA's binding of cuBLAS, is not installed",
            where="nvmath.bindings",
            remedy="Install gpt2cupy[cuda12] or gpt2cupy[cuda13], whichever fits the driver.",
        ) from error
    return cublas, cublasLt


class _Device:
    """Handles and workspace of one GPU; lives as long as the process."""

    def __init__(self) -> None:
        import cupy

        self.cublas, self.lt = _bindings()
        self.handle = self.cublas.create()
        self.lt_handle = self.lt.create()
        self.workspace = cupy.empty(WORKSPACE, np.uint8)
        self.stream = -1  # setting a stream drops the workspace: both are set when it changes
        self.one, self.zero = np.ones(1, np.float32), np.zeros(1, np.float32)


@functools.cache
def _device(device: int) -> _Device:
    return _Device()


# cudaStreamPerThread: one number, and for each thread a stream of its own.
_PER_THREAD = 2


class _Turns:
    """Who may queue work on one GPU that uses the workspace, and the stream it was queued on last.

    A context manager; inside it, it may be entered again.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._stream: Any = None  # the last one as (number, its thread if it is a thread's own)
        self._queued: Any = None  # what waits for the work queued on it

    def __enter__(self) -> None:
        import cupy

        self._lock.acquire()
        try:
            if self._depth == 0:
                current = cupy.cuda.get_current_stream()
                thread = threading.current_thread() if current.ptr == _PER_THREAD else None
                stream = current.ptr, thread
                queued, before = self._queued, self._stream
                self._queued, self._stream = current, stream
                # What is queued on one stream runs in order anyway.
                if queued is not None and before != stream:
                    queued.synchronize()
        except BaseException:
            self._lock.release()
            raise
        self._depth += 1

    def __exit__(self, *exception: object) -> None:
        try:
            if self._depth == 1 and self._stream[1]:
                # Another thread would wait for its own stream by that number, not for this one.
                import cupy

                done = cupy.cuda.Event(disable_timing=True)
                done.record(self._queued)
                self._queued = done
        finally:
            self._depth -= 1
            self._lock.release()


_turns: dict[int, _Turns] = {}


def workspace() -> _Turns:
    """The workspace of the current GPU for what is queued inside: GEMMs, or graphs of them.

    Other threads wait, and so does the host for what another stream has queued.
    """
    device = current_device()
    return _turns.get(device) or _turns.setdefault(device, _Turns())


def _stream() -> int:
    import cupy

    return cupy.cuda.get_current_stream().ptr


def _check(x: Any, weight: Any, bias: Any | None, out: Any) -> None:
    """What launch() checks for our kernels: the library would read and write past the arrays."""
    m = len(weight)
    wrong = (
        weight.shape != (m, x.shape[1])
        or out.shape != (len(x), m)
        or weight.dtype != x.dtype
        or x.dtype.name not in _TYPES
        or out.dtype not in (x.dtype, np.float32)
        or (bias is not None and (bias.shape != (m,) or bias.dtype != out.dtype))
        or not all(a.flags.c_contiguous for a in (x, weight, out))
    )
    if wrong:
        parts = {"x": x, "weight": weight, "bias": bias, "out": out}
        seen = ", ".join(
            f"{name} {array.dtype.name}{list(array.shape)}"
            for name, array in parts.items()
            if array is not None
        )
        raise InputError(
            f"arrays that do not fit each other: {seen}",
            where="linear",
            remedy="Contiguous x [N, K] and weight [M, K] of one dtype, out [N, M] of it or "
            "float32, bias [M] of out's dtype.",
        )


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
    submit(functools.partial(_gemv, _device(device), x, weight, out))


def _gemv(own: _Device, x: Any, weight: Any, out: Any) -> None:
    with workspace():
        _queue_gemv(own, x, weight, out)


def _queue_gemv(own: _Device, x: Any, weight: Any, out: Any) -> None:
    stream = _stream()
    if own.stream != stream:
        own.cublas.set_stream(own.handle, stream)
        own.cublas.set_workspace(own.handle, own.workspace.data.ptr, WORKSPACE)
        own.stream = stream
    m, k = weight.shape
    one, zero = own.one.ctypes.data, own.zero.ctypes.data
    if x.dtype == np.float32:
        # Rows [M, K] are a column-major [K, M] matrix: its transpose times x.
        own.cublas.sgemv(
            own.handle, _OP_T, k, m, one, weight.data.ptr, k, x.data.ptr, 1, zero, out.data.ptr, 1
        )
        return
    kind = _TYPES[x.dtype.name]
    own.cublas.gemm_ex(
        own.handle, _OP_T, _OP_N, m, 1, k, one, weight.data.ptr, kind, k, x.data.ptr, kind, k,
        zero, out.data.ptr, _TYPES[out.dtype.name], m, _COMPUTE_32F, -1,
    )  # fmt: skip


class _Product:
    """A cuBLASLt GEMM of one shape: descriptors, and the algorithm chosen for it.

    Row-major ``out[N, M] = x[N, K] weight[M, K]^T`` is, in the library's column-major
    terms, ``out'[M, N] = weight'^T x'`` with ``weight'`` [K, M] and ``x'`` [K, N].
    """

    def __init__(
        self, own: _Device, n: int, m: int, k: int, kind: str, out_kind: str, epilogue: str | None
    ) -> None:
        lt = own.lt
        self.epilogue = epilogue
        self.desc = lt.matmul_desc_create(_COMPUTE_32F, _TYPES["float32"])
        self._set(lt, "TRANSA", _OP_T)
        self._set(lt, "EPILOGUE", _EPILOGUES[epilogue])
        self.a = lt.matrix_layout_create(_TYPES[kind], k, m, k)
        self.b = lt.matrix_layout_create(_TYPES[kind], k, n, k)
        self.c = lt.matrix_layout_create(_TYPES[out_kind], m, n, m)
        preference = lt.matmul_preference_create()
        size = np.array([WORKSPACE], np.uint64)
        lt.matmul_preference_set_attribute(
            preference, lt.MatmulPreferenceAttribute.MAX_WORKSPACE_BYTES, size.ctypes.data, 8
        )
        self.result = np.zeros(1, lt.matmul_heuristic_result_dtype)
        found = np.zeros(1, np.int32)
        lt.matmul_algo_get_heuristic(
            own.lt_handle, self.desc, self.a, self.b, self.c, self.c, preference, 1,
            self.result.ctypes.data, found.ctypes.data,
        )  # fmt: skip
        lt.matmul_preference_destroy(preference)
        if not found[0]:
            raise DeviceError(
                f"cuBLASLt has no algorithm for [{n}, {k}] x [{m}, {k}]^T in {kind}",
                where="cuBLASLt",
                remedy="Report this with the output of `gpt2cupy info`.",
            )

    def _set(self, lt: Any, name: str, value: int, dtype: Any = np.int32) -> None:
        attribute = getattr(lt.MatmulDescAttribute, name)
        data = np.array([value], dtype)
        lt.matmul_desc_set_attribute(self.desc, attribute, data.ctypes.data, data.nbytes)

    def run(self, own: _Device, x: Any, weight: Any, bias: Any, add: bool, out: Any) -> None:
        with workspace():
            self._queue(own, x, weight, bias, add, out)

    def _queue(self, own: _Device, x: Any, weight: Any, bias: Any, add: bool, out: Any) -> None:
        if bias is not None:
            self._set(own.lt, "BIAS_POINTER", bias.data.ptr, np.uint64)
        beta = own.one if add else own.zero
        own.lt.matmul(
            own.lt_handle, self.desc, own.one.ctypes.data, weight.data.ptr, self.a, x.data.ptr,
            self.b, beta.ctypes.data, out.data.ptr, self.c, out.data.ptr, self.c,
            self.result.ctypes.data, own.workspace.data.ptr, WORKSPACE, _stream(),
        )  # fmt: skip


@functools.lru_cache(maxsize=512)
def _product(
    device: int, n: int, m: int, k: int, kind: str, out_kind: str, epilogue: str | None
) -> _Product:
    return _Product(_device(device), n, m, k, kind, out_kind, epilogue)


def matmul(
    x: Any,
    weight: Any,
    bias: Any | None,
    out: Any,
    *,
    activation: str | None = None,
    add: bool = False,
) -> None:
    """``out = activation(x @ weight.T + bias)``, or ``out += ...`` with ``add``.

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
    """
    _check(x, weight, bias, out)
    device = current_device()
    parts = (["bias"] if bias is not None else []) + ([activation] if activation else [])
    n, k = x.shape
    product = _product(
        device, n, len(weight), k, x.dtype.name, out.dtype.name, "+".join(parts) or None
    )
    submit(functools.partial(product.run, _device(device), x, weight, bias, add, out))
