"""The layers of bench/layers.py as PyTorch computes them, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from layer_models import EPS, Shape

F = torch.nn.functional


def ffn(w: dict[str, Any], shape: Shape, x: Any) -> Any:
    """Three operators."""
    hidden = F.gelu(F.linear(x, w["w1"], w["b1"]), approximate="tanh")
    return F.linear(hidden, w["w2"], w["b2"])


def _attended(q: Any, k: Any, v: Any) -> Any:
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)


def plain(w: dict[str, Any], shape: Shape, x: Any) -> Any:
    h = F.layer_norm(x, x.shape[-1:], w["ln1_w"], w["ln1_b"], EPS)
    qkv = F.linear(h, w["qkv_w"], w["qkv_b"]).unflatten(-1, (3, shape.heads, shape.head_size))
    x = x + F.linear(_attended(*qkv.unbind(2)), w["proj_w"], w["proj_b"])
    return x + ffn(w, shape, F.layer_norm(x, x.shape[-1:], w["ln2_w"], w["ln2_b"], EPS))


def _turned(x: Any, cos: Any, sin: Any) -> Any:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def llama(w: dict[str, Any], shape: Shape, x: Any) -> Any:
    n, g = shape.heads, shape.kv_heads
    h = F.rms_norm(x, x.shape[-1:], w["norm1"], EPS)
    qkv = F.linear(h, w["qkv"]).unflatten(-1, (n + 2 * g, shape.head_size))
    q, k, v = qkv.split((n, g, g), dim=2)
    cos, sin = (w[name][: x.shape[1], None].to(x.dtype) for name in ("cos", "sin"))
    x = x + F.linear(_attended(_turned(q, cos, sin), _turned(k, cos, sin), v), w["o"])
    gate, up = F.linear(F.rms_norm(x, x.shape[-1:], w["norm2"], EPS), w["gate_up"]).chunk(2, -1)
    return x + F.linear(F.silu(gate) * up, w["down"])


PEERS: dict[str, Callable[..., Any]] = {"ffn": ffn, "plain": plain, "llama": llama}
