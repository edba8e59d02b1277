"""What bench/ops.py can measure: each op's inputs, our calls, PyTorch's, and what it must move."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2cupy import ops
from gpt2cupy.ops import reference

# Imported here, not within the functions that are timed; bench/call_cost.py needs neither.
try:
    import torch

    import gpt2cupy.torch as ours
except ImportError:
    functional: Any = None
else:
    functional = torch.nn.functional


@dataclass(frozen=True)
class Case:
    """One op: all callables take inputs in the order that ``inputs`` makes them."""

    inputs: Callable[[np.random.Generator, tuple[int, ...]], list[np.ndarray]]
    outputs: Callable[..., list[tuple[tuple[int, ...], Any]]]  # shapes, and dtypes or None: x's
    ours: Callable[[list[Any], list[Any]], Any]  # arrays, outputs
    ours_torch: Callable[..., Any]
    torch: Callable[..., Any]
    exact: Callable[..., Any]
    exact_result: bool = False  # integers: right or wrong


def _row(rng: np.random.Generator, shape: tuple[int, ...], scale: float = 1.0) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)


def _width(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return _row(rng, shape[-1:])


def _same(x: Any, *rest: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(tuple(x.shape), None)]


def _twice(x: Any, *rest: Any) -> list[tuple[tuple[int, ...], Any]]:
    return [(tuple(x.shape), None)] * 2


def _torch_sample(logits: Any) -> Any:
    """Temperature 0.8, top-k 50, top-p 0.9, the usual way."""
    x = logits.float() / 0.8
    least = torch.topk(x, 50, dim=-1).values[:, -1:]
    x = x.masked_fill(x < least, -math.inf)
    ordered, order = torch.sort(x, dim=-1, descending=True)
    mass = torch.softmax(ordered, dim=-1)
    ordered = ordered.masked_fill(mass.cumsum(-1) - mass > 0.9, -math.inf)
    chosen = torch.multinomial(torch.softmax(ordered, dim=-1), 1)
    return order.gather(-1, chosen)[:, 0]


def _torch_rope(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.chunk(2, dim=-1)
    c, s = cos[: x.shape[-3], None].to(x.dtype), sin[: x.shape[-3], None].to(x.dtype)
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


SETTINGS = {"temperature": 0.8, "top_k": 50, "top_p": 0.9}

CASES = {
    "rms_norm": Case(
        lambda rng, shape: [_row(rng, shape), _width(rng, shape)],
        _same,
        lambda a, out: ops.rms_norm(*a, out=out[0]),
        lambda x, w: ours.rms_norm(x, w),
        lambda x, w: functional.rms_norm(x, x.shape[-1:], w, 1e-6),
        reference.rms_norm,
    ),
    "layer_norm": Case(
        lambda rng, shape: [_row(rng, shape), _width(rng, shape), _width(rng, shape)],
        _same,
        lambda a, out: ops.layer_norm(*a, out=out[0]),
        lambda x, w, b: ours.layer_norm(x, w, b),
        lambda x, w, b: functional.layer_norm(x, x.shape[-1:], w, b, 1e-5),
        reference.layer_norm,
    ),
    "add_rms_norm": Case(
        lambda rng, shape: [_row(rng, shape), _row(rng, shape), _width(rng, shape)],
        _twice,
        lambda a, out: ops.add_rms_norm(*a, out=tuple(out)),
        lambda x, r, w: ours.add_rms_norm(x, r, w),
        lambda x, r, w: (functional.rms_norm(total := x + r, x.shape[-1:], w, 1e-6), total),
        reference.add_rms_norm,
    ),
    "add_layer_norm": Case(
        lambda rng, shape: [_row(rng, shape), _row(rng, shape), *(_width(rng, shape),) * 2],
        _twice,
        lambda a, out: ops.add_layer_norm(*a, out=tuple(out)),
        lambda x, r, w, b: ours.add_layer_norm(x, r, w, b),
        lambda x, r, w, b: (functional.layer_norm(t := x + r, x.shape[-1:], w, b, 1e-5), t),
        reference.add_layer_norm,
    ),
    "gelu": Case(
        lambda rng, shape: [_row(rng, shape)],
        _same,
        lambda a, out: ops.gelu(*a, "tanh", out=out[0]),
        lambda x: ours.gelu(x, "tanh"),
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda x: reference.gelu(x, "tanh"),
    ),
    "gelu_erf": Case(
        lambda rng, shape: [_row(rng, shape)],
        _same,
        lambda a, out: ops.gelu(*a, out=out[0]),
        lambda x: ours.gelu(x),
        lambda x: functional.gelu(x),
        reference.gelu,
    ),
    "bias_gelu": Case(
        lambda rng, shape: [_row(rng, shape), _width(rng, shape)],
        _same,
        lambda a, out: ops.bias_gelu(*a, "tanh", out=out[0]),
        lambda x, b: ours.bias_gelu(x, b, "tanh"),
        lambda x, b: functional.gelu(x + b, approximate="tanh"),
        lambda x, b: reference.bias_gelu(x, b, "tanh"),
    ),
    "silu_mul": Case(
        lambda rng, shape: [_row(rng, shape), _row(rng, shape)],
        _same,
        lambda a, out: ops.silu_mul(*a, out=out[0]),
        lambda gate, up: ours.silu_mul(gate, up),
        lambda gate, up: functional.silu(gate) * up,
        reference.silu_mul,
    ),
    "rope": Case(
        lambda rng, shape: [_row(rng, shape), *ops.rope_tables(shape[-3], shape[-1])],
        _same,
        lambda a, out: ops.rope(*a, out=out[0]),
        lambda x, cos, sin: ours.rope(x, cos, sin),
        _torch_rope,
        reference.rope,
    ),
    "softmax": Case(
        lambda rng, shape: [_row(rng, shape, 3.0)],
        _same,
        lambda a, out: ops.softmax(*a, out=out[0]),
        lambda x: ours.softmax(x),
        lambda x: functional.softmax(x, dim=-1),
        reference.softmax,
    ),
    "sample_logits": Case(
        lambda rng, shape: [_row(rng, shape, 3.0)],
        lambda x: [(tuple(x.shape[:1]), np.int32), (tuple(x.shape), np.float32)],
        lambda a, out: ops.sample_logits(*a, **SETTINGS, out=out[0], scratch=out[1]),
        lambda x: ours.sample_logits(x, **SETTINGS),
        _torch_sample,
        lambda x: reference.sample_logits(x.astype(np.float32), **SETTINGS),
        exact_result=True,
    ),
}
