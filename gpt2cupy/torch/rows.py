"""Activations, rotary embedding, softmax, lookup and sampling of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .launches import run
from .operators import like, operator, refuse_gradient


@operator(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    lambda x, bias, approximate: like(x),
)
def _bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    def call(x: Any, bias: Any, out: Any, approximate: str) -> None:
        ops.bias_gelu(x, bias, approximate, out=out)

    out = like(x)
    run("bias_gelu", call, (x, bias, out), approximate)
    return out


@operator("silu_mul(Tensor gate, Tensor up) -> Tensor", lambda gate, up: like(gate))
def _silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    out = like(gate)
    run("silu_mul", lambda gate, up, out: ops.silu_mul(gate, up, out=out), (gate, up, out))
    return out


@operator(
    "rope(Tensor x, Tensor cosines, Tensor sines, Tensor? positions, bool interleaved) -> Tensor",
    lambda x, cosines, sines, positions, interleaved: like(x),
)
def _rope(
    x: Tensor, cosines: Tensor, sines: Tensor, positions: Tensor | None, interleaved: bool
) -> Tensor:
    def call(x: Any, cos: Any, sin: Any, positions: Any, out: Any, interleaved: bool) -> None:
        ops.rope(x, cos, sin, positions, interleaved=interleaved, out=out)

    out = like(x)
    run("rope", call, (x, cosines, sines, positions, out), interleaved)
    return out


@operator("softmax(Tensor x) -> Tensor", like)
def _softmax(x: Tensor) -> Tensor:
    out = like(x)
    run("softmax", lambda x, out: ops.softmax(x, out=out), (x, out))
    return out


def _rows_of(ids: Tensor, table: Tensor) -> Tensor:
    return torch.empty((*ids.shape, table.shape[-1]), dtype=table.dtype, device=table.device)


@operator("lookup(Tensor ids, Tensor table) -> Tensor", _rows_of)
def _lookup(ids: Tensor, table: Tensor) -> Tensor:
    out = _rows_of(ids, table)
    run("lookup", lambda ids, table, out: ops.lookup(ids, table, out=out), (ids, table, out))
    return out


def _ids_of(logits: Tensor, *settings: Any) -> Tensor:
    return torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device)


@operator(
    "sample_logits(Tensor logits, Tensor? positions, float temperature, int top_k, float top_p, "
    "float min_p, int seed) -> Tensor",
    _ids_of,
)
def _sample_logits(logits: Tensor, positions: Tensor | None, *settings: Any) -> Tensor:
    def call(logits: Any, positions: Any, out: Any, scratch: Any, *settings: Any) -> None:
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        options = dict(zip(names, settings, strict=True))
        ops.sample_logits(logits, positions, **options, out=out, scratch=scratch)

    out = _ids_of(logits)
    scratch = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    run("sample_logits", call, (logits, positions, out, scratch), *settings)
    return out


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """:func:`gpt2cupy.ops.gelu` of a tensor; has no gradient."""
    refuse_gradient("gelu", x)
    return _bias_gelu(x, None, approximate)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """:func:`gpt2cupy.ops.bias_gelu` of tensors; has no gradient."""
    refuse_gradient("bias_gelu", x, bias)
    return _bias_gelu(x, bias, approximate)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.silu_mul` of tensors; has no gradient."""
    refuse_gradient("silu_mul", gate, up)
    return _silu_mul(gate, up)


def rope(
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
) -> Tensor:
    """:func:`gpt2cupy.ops.rope` of tensors; has no gradient."""
    refuse_gradient("rope", x, cosines, sines)
    return _rope(x, cosines, sines, positions, interleaved)


def softmax(x: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.softmax` of a tensor, over its last dimension; has no gradient."""
    refuse_gradient("softmax", x)
    return _softmax(x)


def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.lookup` of tensors; has no gradient."""
    refuse_gradient("lookup", table)
    return _lookup(ids, table)


def sample_logits(
    logits: Tensor,
    positions: Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """:func:`gpt2cupy.ops.sample_logits` of tensors; seeds up to 2^63."""
    return _sample_logits(logits.detach(), positions, temperature, top_k, top_p, min_p, seed)
