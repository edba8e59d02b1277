"""A row for each op: what it is called with, on NumPy and on the GPU (test_registry.py).

A new op needs one here. What it is called with must reach every branch of its kernel that the
shape does not choose; sizes of real models and awkward ones have tests of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from op_checks import draw

from gpt2cupy import ops

# Given random numbers and the dtype of a model: the op's arguments, and those with a keyword.
Row = Callable[[np.random.Generator, np.dtype], tuple[tuple, dict[str, Any]]]
INT = np.int32
N, C, M = 3, 64, 96


def _norm(rng, dtype):
    return draw(rng, C, dtype), draw(rng, C, dtype)


def _cache(rng, dtype):
    """Keys and values of 3 slots, 2 heads of 32 and 16 tokens."""
    return draw(rng, (3, 2, 16, 32), dtype), draw(rng, (3, 2, 16, 32), dtype)


def add_layer_norm(rng, dtype):
    return (draw(rng, (N, C), dtype), draw(rng, (N, C)), *_norm(rng, dtype)), {}


def attention(rng, dtype):
    q, k, v = (draw(rng, (2, 5, heads, 32), dtype) for heads in (4, 2, 2))
    offsets = np.array([0, 3], INT)
    return (q, k, v, True, 0.2, np.array([5, 4], INT), offsets), {}


def decode_attention(rng, dtype):
    q = draw(rng, (2, 4, 32), dtype)
    return (q, *(draw(rng, (2, 9, 2, 32), dtype) for _ in "kv"), np.array([9, 0], INT)), {}


def attention_decode(rng, dtype):
    rows = np.array([2, 0], INT), np.array([15, 0], INT)
    return (draw(rng, (2, 3 * C), dtype), *_cache(rng, dtype), *rows, 0.125), {}


def attention_prefill(rng, dtype):
    rows = np.array([0, 4, 5], INT), np.array([1, 0], INT), np.array([3, 0], INT)
    return (draw(rng, (5, 3 * C), dtype), *_cache(rng, dtype), *rows, 4, 0.125), {}


def bias_act(rng, dtype):
    x, bias = draw(rng, (N, M), dtype), draw(rng, M, dtype)
    return (x, bias, "gelu_tanh"), {"residual": draw(rng, (N, M), dtype)}


def embedding(rng, dtype):
    ids, positions = np.array([4, 0, 4], INT), np.array([1, 0, 6], INT)
    return (ids, positions, draw(rng, (5, C), dtype), draw(rng, (7, C), dtype)), {}


def ffn(rng, dtype):
    x, w1, w2 = draw(rng, (2, N, C), dtype), draw(rng, (M, C), dtype), draw(rng, (C, M), dtype)
    return (x, w1, draw(rng, M, dtype), w2, draw(rng, C, dtype)), {"residual": x}


def last_rows(rng, dtype):
    out = np.zeros((2, C), np.float32), np.zeros((2, C), dtype)
    return (draw(rng, (5, C)), draw(rng, (5, C), dtype), np.array([0, 4, 5], INT)), {"out": out}


def layer_norm(rng, dtype):
    return (draw(rng, (N, C)), *_norm(rng, dtype)), {}


def linear(rng, dtype):
    x, weight, bias = draw(rng, (N, C), dtype), draw(rng, (M, C), dtype), draw(rng, M, dtype)
    return (x, weight, bias), {"activation": "gelu_tanh"}


def norm_linear(rng, dtype):
    weight, bias = draw(rng, (M, C), dtype), draw(rng, M, dtype)
    return (draw(rng, (1, C)), *_norm(rng, dtype), 1e-5, weight, bias), {"activation": "relu"}


def shifted_bias(rng, dtype):
    return (draw(rng, C, dtype), draw(rng, (M, C), dtype), draw(rng, M, dtype)), {}


def target_logprobs(rng, dtype):
    return (draw(rng, (N, 128)), 100, np.array([0, 99, -1], INT)), {}


def add_rms_norm(rng, dtype):
    return (draw(rng, (2, N, C), dtype), draw(rng, (2, N, C), dtype), draw(rng, C, dtype)), {}


def bias_gelu(rng, dtype):
    return (draw(rng, (N, M), dtype), draw(rng, M, dtype)), {}


def gelu(rng, dtype):
    return (draw(rng, (2, N, M), dtype), "tanh"), {}


def layer_norm_backward(rng, dtype):
    return (draw(rng, (N, C), dtype), draw(rng, (N, C), dtype), draw(rng, C, dtype)), {}


def lookup(rng, dtype):
    return (np.array([[4, 0, -1], [5, 2, 2]], INT), draw(rng, (5, C), dtype)), {}


def rms_norm(rng, dtype):
    return (draw(rng, (2, N, C), dtype), draw(rng, C, dtype)), {}


def rms_norm_backward(rng, dtype):
    return layer_norm_backward(rng, dtype)


def rope(rng, dtype):
    tables = ops.rope_tables(16, 24)
    positions = np.array([[3, 0, 15], [9, 16, -1]], INT)
    return (draw(rng, (2, N, 4, 32), dtype), *tables, positions), {"interleaved": True}


def silu_mul(rng, dtype):
    return (draw(rng, (2, N, M), dtype), draw(rng, (2, N, M), dtype)), {}


def softmax(rng, dtype):
    return (draw(rng, (2, N, M), dtype),), {}


ROWS: dict[str, Row] = {
    make.__name__: make
    for make in (
        add_layer_norm, add_rms_norm, attention, attention_decode, attention_prefill, bias_act,
        bias_gelu, decode_attention, embedding, ffn, gelu, last_rows, layer_norm,
        layer_norm_backward, linear, lookup, norm_linear, rms_norm, rms_norm_backward, rope,
        shifted_bias, silu_mul, softmax, target_logprobs,
    )
}  # fmt: skip
# Ops whose results are no real numbers to compare, or that a GPU alone has: where their tests are.
ELSEWHERE = {
    "accept_drafts": "ops/test_drafts.py",
    "copy_slots": "ops/test_slots.py",
    "decode_step": "decode/test_persistent.py",
    "dequantize": "ops/test_quantized.py",
    "gemv": "ops/test_ops.py",
    "propose_drafts": "ops/test_drafts.py",
    "quantize": "ops/test_quantized.py",
    "sample_logits": "ops/test_row_ops.py",
    "sample": "ops/test_sampling.py",
    "store_kv": "ops/test_drafts.py",
    "top_logprobs": "ops/test_sampling.py",
}
