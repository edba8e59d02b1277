"""A GEMM of cuBLASLt: the algorithm chosen once for a shape, and a checked call of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import DeviceError, InputError
from .blas_device import COMPUTE_32F, OP_T, TYPES, WORKSPACE, Handles, current_stream, workspace
from .overlap import Neighbours, meet

_MOST_RESULTS = 8  # algorithms to take one from, for float32
_LONGEST_SUM = 128  # inputs that one sum of float32 should have at most
_EPILOGUES = {None: 1, "relu": 2, "bias": 4, "bias+relu": 6, "gelu_tanh": 32, "bias+gelu_tanh": 36}


def of_short_sums(splits: list[int], k: int) -> int:
    """Which of the library's algorithms to take, the fastest first, by how they share out K.

    One that shares it out too little has long sums, and up to four times PyTorch's error beside a
    channel in the thousands; one that does not share it out at all is another kind of kernel.
    """
    if not 2 <= splits[0] < k / _LONGEST_SUM:
        return 0
    return next((i for i, split in enumerate(splits) if split >= k / _LONGEST_SUM), 0)


class Product:
    """A cuBLASLt GEMM of one shape: descriptors, and the algorithm chosen for it.

    Row-major ``out[N, M] = x[N, K] weight[M, K]^T`` is, in the library's column-major
    terms, ``out'[M, N] = weight'^T x'`` with ``weight'`` [K, M] and ``x'`` [K, N].
    """

    def __init__(
        self,
        own: Handles,
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
        self.desc = lt.matmul_desc_create(COMPUTE_32F, TYPES["float32"])
        self._set(lt, "TRANSA", OP_T)
        self._set(lt, "EPILOGUE", _EPILOGUES[epilogue])
        self.a = lt.matrix_layout_create(TYPES[kind], k, m, k)
        self.b = lt.matrix_layout_create(TYPES[kind], k, n, k)
        self.c = lt.matrix_layout_create(TYPES[out_kind], m, n, m)
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
        taken = of_short_sums([self._splits(lt, results[i:]) for i in range(found[0])], k)
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

    def queue(self, own: Handles, pointers: Sequence[int], memory: int | None, stream: int) -> None:
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
    product : Product
    own : Handles
    values : tuple of arrays or None
        x, weight, bias, residual, out, the WORKSPACE bytes that it works in (None: those of the
        GPU, when its turn has come), and what out must not be (None: nothing more).
    """

    def __init__(self, product: Product, own: Handles, values: tuple[Any, ...]) -> None:
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
        self.start(current_stream(), self._pointers())

    def start(self, stream: int, pointers: Sequence[int]) -> None:
        """Queue it with these pointers, 0 for None; without memory on the current stream alone."""
        *arrays, memory, _ = pointers
        if memory:
            self._product.queue(self._own, arrays, memory, stream)
            return
        with workspace():
            self._product.queue(self._own, arrays, None, stream)
