"""Weights: the one resident layout that every path reads.

One array per kind with the layers stacked in front; matrices as rows
``[out, in]`` (Hugging Face's ``Conv1D`` keeps ``[in, out]``), so that the rows
a block of threads reads are consecutive bytes. The vocabulary is padded with
zero rows to a multiple of 128. All arrays are slices of one buffer, each
starting at a multiple of 256 bytes. A bias has the dtype of the GEMM's
output, so ``proj_b`` and ``out_b``, which are added to the residual stream, are
float32; everything else has the chosen dtype.

======== ============== =================================================
name     shape          what
======== ============== =================================================
wte      [Vp, C]        token embedding (Vp = padded vocabulary)
wpe      [P, C]         position embedding (P = n_positions)
ln1_w/b  [L, C]         layer norm before attention
qkv_w    [L, 3C, C]     query, key and value; qkv_b [L, 3C]
proj_w   [L, C, C]      attention output projection; proj_b [L, C]
ln2_w/b  [L, C]         layer norm before the MLP
fc_w     [L, F, C]      MLP expansion; fc_b [L, F] (F = inner size)
out_w    [L, C, F]      MLP output projection; out_b [L, C]
lnf_w/b  [C]            last layer norm
lm_head  [Vp, C]        logits; the array ``wte`` itself when tied
======== ============== =================================================

With int8 the matrices (wte, qkv_w, proj_w, fc_w, out_w, lm_head) are
:class:`QuantizedMatrix`, on the GPU only: the CPU holds their dequantised values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .config import GPT2Config
from .errors import InputError
from .quantize import MATRICES, SCALE_DTYPE, QuantizedMatrix, scale_shape

ALIGNMENT = 256  # bytes; what cudaMalloc itself promises
RESIDUAL_BIASES = ("proj_b", "out_b")
_SCALES = ".scales"  # of a matrix in int8, behind its name


def weight_shapes(config: GPT2Config) -> dict[str, tuple[int, ...]]:
    """Shape of every array of :class:`Weights`, in the order in which they lie in memory."""
    layers, c, f = config.n_layer, config.n_embd, config.inner_size
    shapes: dict[str, tuple[int, ...]] = {
        "wte": (config.padded_vocab_size, c),
        "wpe": (config.n_positions, c),
        "ln1_w": (layers, c),
        "ln1_b": (layers, c),
        "qkv_w": (layers, 3 * c, c),
        "qkv_b": (layers, 3 * c),
        "proj_w": (layers, c, c),
        "proj_b": (layers, c),
        "ln2_w": (layers, c),
        "ln2_b": (layers, c),
        "fc_w": (layers, f, c),
        "fc_b": (layers, f),
        "out_w": (layers, c, f),
        "out_b": (layers, c),
        "lnf_w": (c,),
        "lnf_b": (c,),
    }
    if not config.tie_word_embeddings:
        shapes["lm_head"] = (config.padded_vocab_size, c)
    return shapes


@dataclass(frozen=True)
class Weights:
    """Every parameter of a GPT-2; the table of its module has names and shapes.

    Attributes
    ----------
    dtype : numpy.dtype
        The chosen dtype: float32, float16 or bfloat16 (``ml_dtypes``). With int8, that of
        all else, and of activations and cache.
    nbytes : int
        Bytes of the one buffer that holds all arrays.
    """

    wte: Any
    wpe: Any
    ln1_w: Any
    ln1_b: Any
    qkv_w: Any
    qkv_b: Any
    proj_w: Any
    proj_b: Any
    ln2_w: Any
    ln2_b: Any
    fc_w: Any
    fc_b: Any
    out_w: Any
    out_b: Any
    lnf_w: Any
    lnf_b: Any
    lm_head: Any
    nbytes: int

    @property
    def dtype(self) -> np.dtype:
        return self.wpe.dtype

    @classmethod
    def empty(
        cls, config: GPT2Config, dtype: Any, xp: Any = np, *, quantize: str | None = None
    ) -> Weights:
        """Allocate the layout, zeroed, with ``xp`` = ``numpy`` or ``cupy``.

        ``quantize="int8"`` makes the matrices :class:`QuantizedMatrix`.
        """
        dtype = np.dtype(dtype)
        residual = np.dtype(np.float64 if dtype == np.float64 else np.float32)
        places, end = {}, 0
        for name, shape in weight_shapes(config).items():
            own = residual if name in RESIDUAL_BIASES else dtype
            parts = {name: (shape, own)}
            if quantize and name in MATRICES:
                parts = {
                    name: (shape, np.dtype(np.int8)),
                    name + _SCALES: (scale_shape(shape), SCALE_DTYPE),
                }
            for part, (dims, kind) in parts.items():
                places[part] = (end, dims, kind)
                end += -(-math.prod(dims) * kind.itemsize // ALIGNMENT) * ALIGNMENT
        # NumPy promises 16 bytes only: take one unit more and start at an aligned address.
        slack = ALIGNMENT if xp is np else 0
        buffer = xp.zeros(end + slack, dtype=np.uint8)
        start = -buffer.ctypes.data % ALIGNMENT if xp is np else 0
        arrays = {}
        for name, (offset, shape, own) in places.items():
            first = start + offset
            size = math.prod(shape) * own.itemsize
            arrays[name] = buffer[first : first + size].view(own).reshape(shape)
        for name in [name for name in arrays if name + _SCALES in arrays]:
            arrays[name] = QuantizedMatrix(arrays[name], arrays.pop(name + _SCALES))
        arrays.setdefault("lm_head", arrays["wte"])
        return cls(**arrays, nbytes=end)

    @classmethod
    def from_tensors(
        cls, config: GPT2Config, tensors: Iterable[tuple[str, int | None, np.ndarray]], dtype: Any
    ) -> Weights:
        """Fill the layout on the host.

        Parameters
        ----------
        tensors : iterable of (name, layer, array)
            ``name`` is an attribute of this class, ``layer`` an index or None,
            and ``array`` the values in rows ``[out, in]``; vocabulary arrays
            have ``vocab_size`` rows and are padded here. Values are rounded to
            ``dtype``.

        Raises
        ------
        InputError
            If an array has another shape than the configuration asks for.
        """
        weights = cls.empty(config, dtype)
        for name, layer, array in tensors:
            target = getattr(weights, name)
            if layer is not None:
                target = target[layer]
            if name in ("wte", "lm_head"):
                target = target[: config.vocab_size]
            if array.shape != target.shape:
                raise InputError(
                    f"{name} has shape {array.shape}, the configuration asks for {target.shape}",
                    where=f"layer {layer}" if layer is not None else name,
                    remedy="The weights and the configuration belong to different models.",
                )
            target[...] = array
        return weights

    @classmethod
    def random(cls, config: GPT2Config, seed: int, dtype: Any = np.float32) -> Weights:
        """GPT-2's initialisation: N(0, 0.02), projections scaled by 1/sqrt(2 L), norms near 1.

        Biases and norm parameters are drawn too (0.02 around 0 and 1): with
        zeros and ones an implementation that skipped them would look right.
        """
        rng = np.random.default_rng(seed)

        def draw() -> Iterator[tuple[str, int | None, np.ndarray]]:
            for name, shape in weight_shapes(config).items():
                if name in ("wte", "lm_head"):
                    shape = (config.vocab_size, config.n_embd)
                layers = range(config.n_layer) if name[-2:] in ("_w", "_b") else [None]
                if name.startswith("lnf"):
                    layers = [None]
                for layer in layers:
                    part = shape if layer is None else shape[1:]
                    values = rng.standard_normal(part, dtype=np.float32) * np.float32(0.02)
                    if name in ("proj_w", "out_w"):
                        values *= np.float32((2 * config.n_layer) ** -0.5)
                    if name.startswith("ln") and name.endswith("_w"):
                        values += 1
                    yield name, layer, values

        return cls.from_tensors(config, draw(), dtype)

    def items(self) -> Iterator[tuple[str, Any]]:
        """(name, array) of every distinct array; a tied ``lm_head`` is left out."""
        for field in fields(self):
            array = getattr(self, field.name)
            if field.name != "nbytes" and not (field.name == "lm_head" and array is self.wte):
                yield field.name, array

    def __reduce__(self) -> Any:
        raise InputError(
            "a GPT2 and its weights are not pickled",
            where="Weights",
            remedy="Load the model by its name or path in the other process.",
        )
