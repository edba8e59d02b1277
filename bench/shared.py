"""What the benchmarks share: model sizes, random weights, what fits, and how fast memory reads."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

from gpt2cupy import GPT2, GPT2Config, decode, record
from gpt2cupy.checkpoint.layout import LAYER, PREFIX, WHOLE
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.loading import resolve_device, resolve_dtype
from gpt2cupy.ops.core.device import import_cupy
from gpt2cupy.quantize import LARGEST, MATRICES, SCALE_DTYPE, QuantizedMatrix, scale_shape
from gpt2cupy.timing import Timing, device_times
from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT
from gpt2cupy.weights import Weights, weight_shapes

SIZES = {"124M": "gpt2", "355M": "gpt2-medium", "774M": "gpt2-large", "1558M": "gpt2-xl"}
# For trying a script where there is no GPU; its figures mean nothing.
TINY = GPT2Config(vocab_size=512, n_positions=128, n_embd=128, n_layer=2, n_head=2)
DTYPES = ("float16", "bfloat16", "float32")
PREFILL_ROWS = 1024
SCALE = 4  # of the output products of a checkpoint's layers

READ_KERNEL = r"""
extern "C" __global__ void read_all(const uint4* data, long long n, unsigned* out) {
  unsigned seen = 0;
  long long stride = (long long)gridDim.x * blockDim.x;
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  for (; i + 3 * stride < n; i += 4 * stride) {  // four loads in flight a thread
    uint4 a = data[i], b = data[i + stride], c = data[i + 2 * stride], d = data[i + 3 * stride];
    seen ^= a.x ^ a.y ^ a.z ^ a.w ^ b.x ^ b.y ^ b.z ^ b.w;
    seen ^= c.x ^ c.y ^ c.z ^ c.w ^ d.x ^ d.y ^ d.z ^ d.w;
  }
  for (; i < n; i += stride) {
    uint4 a = data[i];
    seen ^= a.x ^ a.y ^ a.z ^ a.w;
  }
  if (seen == 0x5eed1234u) *out = seen;  // keeps the loads, hardly ever stores
}
"""


def config_of(name: str) -> GPT2Config:
    """A size (124M, 355M, 774M, 1558M), "tiny", or a name that GPT2Config knows."""
    return TINY if name == "tiny" else GPT2Config.from_name(SIZES.get(name, name))


def paths(device: str) -> list[str]:
    """The ways to run a decode step, the plainest first."""
    if device == "cpu":
        return list(decode.paths(np))
    return list(decode.paths(import_cupy()))


def default_path(device: str) -> str:
    """The decode path that is the fastest."""
    return "eager" if device == "cpu" else "auto"


def backends(dtype: str, batch: int, device: str) -> list[str]:
    """What may multiply by the weights: ours and cuBLAS for few rows, one for the others."""
    few = batch == 1 or (batch <= 256 and dtype != "float32")
    return ["ours", "cublas"] if few and device != "cpu" else ["ours"]


def prompts(config: GPT2Config, batch: int, length: int) -> list[list[int]]:
    """Random ids, the same in every run."""
    return np.random.default_rng(1).integers(0, config.vocab_size, (batch, length)).tolist()


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def parameter_bytes(config: GPT2Config, dtype: str) -> int:
    return itemsize(dtype) * sum(math.prod(shape) for shape in weight_shapes(config).values())


def step_bytes(
    config: GPT2Config, dtype: str, batch: int, context: int, quantize: str | None = None
) -> int:
    """Bytes that a decode step must read: each weight once, and keys and values of the context.

    Of the embeddings only the rows of the tokens are read; a tied token embedding
    is read whole, for the logits. Matrices in int8 take a byte per weight and two per
    scale.
    """
    tables = ["wpe"] if config.tie_word_embeddings else ["wpe", "wte"]
    size = 2 * config.n_layer * batch * context * config.n_embd * itemsize(dtype)
    for name, shape in weight_shapes(config).items():
        shape = (batch, config.n_embd) if name in tables else shape
        if quantize and name in MATRICES:
            size += math.prod(shape) + SCALE_DTYPE.itemsize * math.prod(scale_shape(shape))
        else:
            size += itemsize(dtype) * math.prod(shape)
    return size


def too_large(config: GPT2Config, dtype: str, batch: int, device: str, engines: int = 1) -> str:
    """Why models with their caches and a buffer to read do not fit the GPU, or nothing."""
    if device == "cpu":
        return ""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()
    free = cupy.cuda.runtime.memGetInfo()[0]
    context = config.n_positions
    cache = step_bytes(config, dtype, batch, context) - step_bytes(config, dtype, batch, 0)
    rows = min(PREFILL_ROWS, batch * context)
    work = rows * (5 * config.n_embd + config.inner_size) * itemsize(dtype) + rows * 4096
    # The weights, as many bytes again to read beside them, and a gigabyte for the driver.
    needed = engines * (2 * (parameter_bytes(config, dtype) + cache) + work + (1 << 30))
    if needed <= free:
        return ""
    return f"needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def random_model(config: GPT2Config, dtype: str, device: str, quantize: str | None = None) -> GPT2:
    """A model whose weights repeat some random numbers: made in a second at every size."""
    kind, _ = resolve_device(device)
    if kind == "cpu":
        return GPT2.random(config, 0, dtype=dtype, device="cpu", quantize=quantize)
    import cupy

    held = resolve_dtype(dtype, np.dtype(np.float32), kind)
    weights = Weights.empty(config, held, cupy, quantize=quantize)
    for name, array in weights.items():
        if isinstance(array, QuantizedMatrix):
            fill(array.values, spread=40)
            fill(array.scales, around=0.02 / 40, spread=0.002 / 40)
            continue
        fill(array, 1.0 if name.startswith("ln") and name.endswith("_w") else 0.0)
    return GPT2(config, weights)


def fill(array: Any, around: float = 0.0, spread: float = 0.02) -> None:
    """Fill an array on the GPU with a few million random numbers, again and again."""
    import cupy

    from gpt2cupy.ops.layout import Uploader

    uploader = Uploader()
    values = np.random.default_rng(0).standard_normal(1 << 22, dtype=np.float32)
    values = values * np.float32(spread) + np.float32(around)
    if array.dtype == np.int8:
        values = values.clip(-LARGEST, LARGEST)
    pool, flat = values.astype(array.dtype), array.reshape(-1)
    for start in range(0, flat.size, pool.size):
        part = flat[start : start + pool.size]
        uploader.copy(pool[: part.size], part)
    cupy.cuda.get_current_stream().synchronize()  # the uploader's memory goes with it


class Kept:
    """A record that grows by rows; used in a ``with`` statement.

    It is written when the block ends, also by an error, and by :meth:`save`. Only one whose
    block came to its end is complete, and none with a row in which no engine ran.

    Parameters
    ----------
    out : path
    settings : dict
        What goes before the rows.
    gpu : bool
    """

    def __init__(self, out: Path, settings: dict[str, Any], *, gpu: bool) -> None:
        self.out, self.settings, self.gpu = out, settings, gpu
        self.rows: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}

    def skip(self, what: str, reason: str) -> None:
        """Note what is left out, and say so."""
        self.skipped[what] = reason
        print(f"{what}: skipped, {reason}", flush=True)

    def save(self, *, complete: bool = False) -> None:
        """Write what there is, if there is anything."""
        if self.rows:
            results = self.settings | {"rows": self.rows, "skipped": self.skipped}
            record.write(self.out, results, gpu=self.gpu, complete=complete)

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        empty = [row for row in self.rows if row.get("engines") == {}]
        self.save(complete=kind is None and not empty)
        if kind is None and empty:
            raise Gpt2CupyError(
                f"no engine ran in {len(empty)} of {len(self.rows)} rows",
                where=str(self.out),
                remedy="The record says why, under skipped.",
            )


class Reader:
    """Reads memory as fast as a plain kernel can; the yardstick beside every figure."""

    def __init__(self) -> None:
        import cupy

        self.kernel = cupy.RawKernel(READ_KERNEL, "read_all")
        self.blocks = 8 * cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.out = cupy.zeros(1, np.uint32)
        self.timed: dict[int, Timing] = {}

    def read(self, array: Any) -> None:
        """Queue a read of an array's bytes (up to 15 at its end are left out)."""
        size = np.int64(array.nbytes // 16)
        self.kernel((self.blocks,), (256,), (array, size, self.out))

    def time(self, size: int) -> Timing:
        """Reading ``size`` bytes again and again, as decode steps read the weights."""
        import cupy

        if size not in self.timed:
            buffer = cupy.empty(size // 2, np.float16)
            fill(buffer)
            self.timed[size] = device_times(lambda: self.read(buffer), runs=20, inner=5)
        return self.timed[size]


def write_checkpoint(folder: Path, config: GPT2Config, dtype: str, seed: int = 0) -> None:
    """A checkpoint of random weights in Hugging Face's layout, with a tokenizer of its size."""
    weights = Weights.random(config, seed, resolve_dtype(dtype, np.dtype(np.float32), "cuda"))
    # As initialised, a tied model repeats its last token; with layers that weigh more the text
    # depends on all before it, and an engine that computes something else is seen.
    weights.proj_w[...] *= SCALE
    weights.out_w[...] *= SCALE
    tensors = {PREFIX + key: getattr(weights, name) for key, name in WHOLE.items()}
    tensors[PREFIX + "wte.weight"] = weights.wte[: config.vocab_size]
    for layer in range(config.n_layer):
        for key, (name, transposed) in LAYER.items():
            array = getattr(weights, name)[layer].astype(weights.dtype)
            tensors[f"{PREFIX}h.{layer}.{key}"] = array.T if transposed else array
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: np.ascontiguousarray(array) for key, array in tensors.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    # The 256 bytes, as many pairs of them as are wanted, and end-of-text.
    symbols = sorted(BYTE_SYMBOLS, key=BYTE_SYMBOLS.__getitem__)
    pairs = [(a, b) for a in symbols for b in symbols][: config.vocab_size - 257]
    tokens = [*symbols, *(a + b for a, b in pairs), END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(f"{a} {b}" for a, b in pairs))
