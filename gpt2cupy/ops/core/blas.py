"""cuBLAS and cuBLASLt through NVIDIA's own bindings: the only place that touches them.

CuPy's wrappers refuse to run during stream capture and have no cuBLASLt, so the
handles and the workspace here are ours. Algorithms are chosen once per problem
and pinned, so that the same call gives the same bits. Streams of one GPU share the
workspace: one waits for the other, whichever threads they come from; a caller with memory
of its own gives that (:func:`working_in`).
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import numpy as np

from ...errors import DeviceError, InputError
from .device import current_device
from .signature import Neighbours, meet
from .tape import submit

WORKSPACE = 32 << 20  # bytes; what NVIDIA recommends for Hopper, ample elsewhere
_MOST_RESULTS = 8  # algorithms to take one from, for float32
_LONGEST_SUM = 128  # inputs that one sum of float32 should have at most

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
    if x.dtype.name not in _TYPES:
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


# What the products that are asked for work in, None: the workspace.
_MEMORY: ContextVar[Any] = ContextVar("_MEMORY", default=None)


@contextlib.contextmanager
def working_in(memory: Any) -> Iterator[None]:
    """Within, cuBLASLt works in these WORKSPACE bytes and takes no turns at the GPU's own.

    Whoever gives them says when they are used again. None, or no bytes: as without.
    """
    token = _MEMORY.set(memory if memory is not None and memory.size else None)
    try:
        yield
    finally:
        _MEMORY.reset(token)


def _of_short_sums(splits: list[int], k: int) -> int:
    """Which of the library's algorithms to take, the fastest first, by how they share out K.

    One that shares it out too little has long sums, and up to four times PyTorch's error beside a
    channel in the thousands; one that does not share it out at all is another kind of kernel.
    """
    if not 2 <= splits[0] < k / _LONGEST_SUM:
        return 0
    return next((i for i, split in enumerate(splits) if split >= k / _LONGEST_SUM), 0)


class _Product:
    """A cuBLASLt GEMM of one shape: descriptors, and the algorithm chosen for it.

    Row-major ``out[N, M] = x[N, K] weight[M, K]^T`` is, in the library's column-major
    terms, ``out'[M, N] = weight'^T x'`` with ``weight'`` [K, M] and ``x'`` [K, N].
    """

    def __init__(
        self,
        own: _Device,
        n: int,
        m: int,
        k: int,
        kind: str,
        out_kind: str,
        epilogue: str | None,
        wide_sums: bool,
    ) -> None:
        lt = own.lt
        self.epilogue = epilogue
        self.lock = threading.Lock()  # the description holds the pointer of the bias
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
        if wide_sums:  # what shares of K give is added in float32, not in the output's dtype
            schemes = np.array([int(lt.ReductionScheme.COMPUTE_TYPE)], np.uint32)
            scheme_mask = lt.MatmulPreferenceAttribute.REDUCTION_SCHEME_MASK
            lt.matmul_preference_set_attribute(preference, scheme_mask, schemes.ctypes.data, 4)
        most = _MOST_RESULTS if kind == "float32" else 1
        results = np.zeros(most, lt.matmul_heuristic_result_dtype)
        found = np.zeros(1, np.int32)
        lt.matmul_algo_get_heuristic(
            own.lt_handle, self.desc, self.a, self.b, self.c, self.c, preference, most,
            results.ctypes.data, found.ctypes.data,
        )  # fmt: skip
        lt.matmul_preference_destroy(preference)
        if not found[0]:
            raise DeviceError(
                f"cuBLASLt has no algorithm for [{n}, {k}] x [{m}, {k}]^T in {kind}",
                where="cuBLASLt",
                remedy="Report this with the output of `gpt2cupy info`.",
            )
        taken = _of_short_sums([self._splits(lt, results[i:]) for i in range(found[0])], k)
        self.result = results[taken : taken + 1].copy()

    @staticmethod
    def _splits(lt: Any, results: np.ndarray) -> int:
        """Into how many parts the first algorithm shares out K."""
        found, size = np.zeros(1, np.int32), np.zeros(1, np.uint64)
        split = lt.MatmulAlgoConfigAttribute.SPLITK_NUM
        lt.matmul_algo_config_get_attribute(
            results.ctypes.data, split, found.ctypes.data, found.nbytes, size.ctypes.data
        )
        return int(found[0])

    def _set(self, lt: Any, name: str, value: int, dtype: Any = np.int32) -> None:
        attribute = getattr(lt.MatmulDescAttribute, name)
        data = np.array([value], dtype)
        lt.matmul_desc_set_attribute(self.desc, attribute, data.ctypes.data, data.nbytes)

    def queue(self, own: _Device, pointers: Sequence[int], memory: int | None, stream: int) -> None:
        """Queue it: pointers of x, weight, bias, residual and out, 0 for None.

        It works in WORKSPACE bytes at ``memory``, by default in the GPU's workspace.
        """
        if memory is None:
            memory = own.workspace.data.ptr
        x, weight, bias, residual, out = pointers
        beta, added = (own.one, residual) if residual else (own.zero, out)
        with self.lock:
            if bias:
                self._set(own.lt, "BIAS_POINTER", bias, np.uint64)
            own.lt.matmul(
                own.lt_handle, self.desc, own.one.ctypes.data, weight, self.a, x, self.b,
                beta.ctypes.data, added, self.c, out, self.c, self.result.ctypes.data, memory,
                WORKSPACE, stream,
            )  # fmt: skip


_NAMES = ("x", "weight", "bias", "residual", "out", "memory", "residual")
_OUT, _RESIDUAL = 4, 3


class Queued:
    """A checked call of cuBLASLt, as a Launch is one of a kernel of ours.

    Parameters
    ----------
    product : _Product
    own : _Device
    values : tuple of arrays or None
        x, weight, bias, residual, out, the WORKSPACE bytes that it works in (None: those of the
        GPU, when its turn has come), and what out must not be (None: nothing more).
    """

    def __init__(self, product: _Product, own: _Device, values: tuple[Any, ...]) -> None:
        self._product, self._own = product, own
        self.values = values
        self.pairs = tuple(self._neighbours())

    def _neighbours(self) -> Iterator[Neighbours]:
        out = self.values[_OUT]
        for place, other in enumerate(self.values):
            if other is not None and place != _OUT:
                low, high = -out.nbytes, other.nbytes
                yield Neighbours(_OUT, place, low, high, place == _RESIDUAL, (0, 0, 0))

    def check(self) -> None:
        """Refuse an output that lies where an input does."""
        pointers = self._pointers()
        for pair in self.pairs:
            if meet(pair, pointers[pair.written] - pointers[pair.other]):
                raise InputError(
                    f"out shares memory with {_NAMES[pair.other]}",
                    where="linear: out",
                    remedy="Give an output memory of its own, or the very array of the residual.",
                )

    def _pointers(self) -> list[int]:
        return [0 if value is None else value.data.ptr for value in self.values]

    def __call__(self) -> None:
        self.start(_stream(), self._pointers())

    def start(self, stream: int, pointers: Sequence[int]) -> None:
        """Queue it with these pointers, 0 for None; without memory on the current stream alone."""
        *arrays, memory, _ = pointers
        if memory:
            self._product.queue(self._own, arrays, memory, stream)
            return
        with workspace():
            self._product.queue(self._own, arrays, None, stream)


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
) -> _Product:
    return _Product(_device(device), n, m, k, kind, out_kind, epilogue, wide_sums)


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
    values = x, weight, bias, residual, out, _MEMORY.get(), apart
    queued = Queued(product, _device(device), values)
    queued.check()
    submit(queued)
