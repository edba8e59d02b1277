"""What an op must do: the bytes it has to move and the operations it has to make.

One function per op, with the op's own arguments. Bytes count each input once and
each output once, as if caches held everything in between; operations count a
multiplication and an addition as two. Both are lower bounds: a kernel that moves
more is slow for a reason, and that is what the comparison is for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..quantize import QuantizedMatrix

Array = Any


class Cost(NamedTuple):
    """Bytes moved and operations made."""

    bytes: float
    flops: float


def _size(*arrays: Array | None) -> int:
    return sum(array.nbytes for array in arrays if array is not None)


def embedding(
    ids: Array, positions: Array, wte: Array, wpe: Array, *, out: Array | None = None
) -> Cost:
    """A row of each table per token, and one written of the residual stream's dtype."""
    n, c = len(ids), wte.shape[1]
    written = n * c * 4 if out is None else out.nbytes
    rows = n * c * (wte.dtype.itemsize + wpe.dtype.itemsize)
    return Cost(_size(ids, positions) + rows + written, n * c)


def layer_norm(
    x: Array, weight: Array, bias: Array, eps: float = 1e-5, *, out: Array | None = None
) -> Cost:
    """Mean (1), variance (3), normalise (2), weight and bias (2): 8 per value."""
    written = x.size * weight.dtype.itemsize if out is None else out.nbytes
    return Cost(_size(x, weight, bias) + written, 8 * x.size)


def add_layer_norm(
    x: Array,
    residual: Array,
    weight: Array,
    bias: Array,
    eps: float = 1e-5,
    *,
    out: Array | None = None,
) -> Cost:
    """Layer norm of the sum, which is written too."""
    norm = layer_norm(residual, weight, bias, out=out)
    return Cost(norm.bytes + _size(x, residual), norm.flops + x.size)


def linear(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    residual: Array | None = None,
    out: Array | None = None,
    backend: str = "ours",
    scratch: Array | None = None,
) -> Cost:
    """The product, 2 N M K; the epilogue is not counted, except for its bytes.

    A matrix in int8 is read as it is: a byte per weight, and the scales.
    """
    n, k = x.shape
    m = len(weight)
    itemsize = (x if residual is None else residual).dtype.itemsize
    written = n * m * itemsize if out is None else out.nbytes
    return Cost(_size(x, weight, bias, residual) + written, 2 * n * m * k)


def norm_linear(
    x: Array,
    norm_weight: Array,
    norm_bias: Array,
    eps: float,
    weight: Array,
    bias: Array | None = None,
    *,
    activation: str | None = None,
    out: Array | None = None,
    h: Array | None = None,
    backend: str = "ours",
    scratch: Array | None = None,
) -> Cost:
    """The norm once and the product, with nothing written between them."""
    n, m = len(x), len(weight)
    written = n * m * weight.dtype.itemsize if out is None else out.nbytes
    moved = _size(x, norm_weight, weight, norm_bias, bias) + written
    return Cost(moved, 8 * x.size + 2 * n * m * weight.shape[1])


def bias_act(
    x: Array,
    bias: Array | None = None,
    activation: str | None = None,
    *,
    residual: Array | None = None,
    out: Array | None = None,
) -> Cost:
    """An addition per bias and residual, and one operation per activated value."""
    parts = (bias is not None) + (residual is not None) + (activation is not None)
    written = x.nbytes if out is None else out.nbytes
    return Cost(_size(x, bias, residual) + written, parts * x.size)


def attention_decode(
    qkv: Array,
    k: Array,
    v: Array,
    slots: Array,
    positions: Array,
    scale: float,
    *,
    out: Array | None = None,
    batch_invariant: bool = False,
    context: float,
) -> Cost:
    """Keys and values of ``context`` earlier tokens per row, and the new ones written.

    Parameters
    ----------
    context : float
        Tokens that each row's slot holds before the step; a mean over steps is
        right too, for the cost grows in proportion.
    """
    batch, channels = len(qkv), qkv.shape[1] // 3
    itemsize = qkv.dtype.itemsize
    written = batch * channels * itemsize if out is None else out.nbytes
    cache = 2 * batch * channels * itemsize * (context + 1)
    flops = 4 * batch * channels * (context + 1)
    return Cost(_size(qkv, slots, positions) + cache + written, flops)


def decode_step(
    ids: Array,
    positions: Array,
    slots: Array,
    weights: Mapping[str, Array],
    k: Array,
    v: Array,
    mailboxes: Array,
    *,
    scale: float,
    by_layer: bool,
    eps: float,
    activation: str,
    out: Array,
    context: float,
) -> Cost:
    """Every weight once but the embeddings, of which a row each; keys and values as above.

    What blocks tell each other is no input and no output.
    """
    rows, layers = len(ids), len(k)
    tables = "wte", "wpe", "lm_head"
    layered = [array for name, array in weights.items() if name not in tables]
    channels, itemsize = weights["wpe"].shape[1], k.dtype.itemsize
    cache = 2 * layers * rows * channels * itemsize * (context + 1)
    embedded = 2 * rows * channels * itemsize
    products = sum(each.size for each in layered if each.ndim == 3) + weights["lm_head"].size
    flops = 2 * rows * products + 4 * layers * rows * channels * (context + 1)
    read = _size(ids, positions, slots, weights["lm_head"], *layered)
    return Cost(read + embedded + cache + out.nbytes, flops)


def sample(
    logits: Array,
    vocab_size: int,
    rows: Array,
    params: Array,
    ids: Array,
    positions: Array,
    steps: Array,
    ring: Array,
    *,
    counts: Array | None = None,
    bias: Array | None = None,
    scratch: Array | None = None,
    plain: bool = False,
) -> Cost:
    """One pass over V logits (counts, bias) per row; maximum, exponential and sum: 3 per logit."""
    n = len(logits)
    bytes_per_logit = logits.dtype.itemsize + sum(
        array.dtype.itemsize for array in (counts, bias) if array is not None
    )
    per_row = params.shape[1] + ring.shape[2] + 2 * (ids.itemsize + positions.itemsize)
    per_row += rows.itemsize + 2 * steps.itemsize
    return Cost(n * (vocab_size * bytes_per_logit + per_row), 3 * n * vocab_size)


COUNTS: dict[str, Callable[..., Cost]] = {
    "embedding": embedding,
    "layer_norm": layer_norm,
    "add_layer_norm": add_layer_norm,
    "linear": linear,
    "norm_linear": norm_linear,
    "bias_act": bias_act,
    "attention_decode": attention_decode,
    "decode_step": decode_step,
    "sample": sample,
}


def of_parts(op: str, args: tuple, options: dict[str, Any], parts: int) -> list[Cost | None]:
    """The cost of each of the launches that an op was made of.

    A product that the library ends without our epilogue is two launches; of any
    other op with several, and of a product with a matrix in int8, which may be dequantised
    first, the whole cost stands at the first.
    """
    in_int8 = op == "linear" and isinstance(args[1], QuantizedMatrix)
    if op == "linear" and parts == 2 and not in_int8:
        x, weight, bias = (*args, None)[:3]
        bias, out = options.get("bias", bias), options["out"]
        epilogue = {key: options.get(key) for key in ("activation", "residual")}
        return [linear(x, weight, out=out), bias_act(out, bias, **epilogue, out=out)]
    whole = COUNTS[op](*args, **options) if op in COUNTS else None
    return [whole, *[None] * (parts - 1)]
