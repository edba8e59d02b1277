"""Activations, rotary embedding, softmax, lookup and sampling of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .launches import launches
from .operators import like, refuse_gradient, refuses_types


@launches(
    "bias_gelu(Tensor x, Tensor? bias, str approximate) -> Tensor",
    lambda x, bias, approximate: like(x),
)
def _bias_gelu(x: Any, bias: Any, out: Any, approximate: str) -> None:
    ops.bias_gelu(x, bias, approximate, out=out)


@launches("silu_mul(Tensor gate, Tensor up) -> Tensor", lambda gate, up: like(gate))
def _silu_mul(gate: Any, up: Any, out: Any) -> None:
    ops.silu_mul(gate, up, out=out)


@launches(
    "rope(Tensor x, Tensor cosines, Tensor sines, Tensor? positions, bool interleaved) -> Tensor",
    lambda x, cosines, sines, positions, interleaved: like(x),
)
def _rope(x: Any, cosines: Any, sines: Any, positions: Any, out: Any, interleaved: bool) -> None:
    ops.rope(x, cosines, sines, positions, interleaved=interleaved, out=out)


@launches("softmax(Tensor x) -> Tensor", like)
def _softmax(x: Any, out: Any) -> None:
    ops.softmax(x, out=out)


@launches(
    "lookup(Tensor ids, Tensor table) -> Tensor",
    lambda ids, table: torch.empty(
        (*ids.shape, table.shape[-1]), dtype=table.dtype, device=table.device
    ),
)
def _lookup(ids: Any, table: Any, out: Any) -> None:
    ops.lookup(ids, table, out=out)


def _float32_like(logits: Tensor, *rest: Any) -> tuple[Tensor]:
    return (torch.empty(logits.shape, dtype=torch.float32, device=logits.device),)


@launches(
    "sample_logits(Tensor logits, Tensor? positions, float temperature, int top_k, float top_p, "
    "float min_p, int seed) -> Tensor",
    lambda logits, *rest: torch.empty(logits.shape[:1], dtype=torch.int32, device=logits.device),
    _float32_like,
)
def _sample_logits(logits: Any, positions: Any, out: Any, scratch: Any, *settings: Any) -> None:
    names = ("temperature", "top_k", "top_p", "min_p", "seed")
    options = dict(zip(names, settings, strict=True))
    ops.sample_logits(logits, positions, **options, out=out, scratch=scratch)


@refuses_types
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """:func:`gpt2cupy.ops.gelu` of a tensor; has no gradient."""
    refuse_gradient("gelu", x)
    return _bias_gelu(x, None, approximate)


@refuses_types
def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str = "none") -> Tensor:
    """:func:`gpt2cupy.ops.bias_gelu` of tensors; has no gradient."""
    refuse_gradient("bias_gelu", x, bias)
    return _bias_gelu(x, bias, approximate)


@refuses_types
def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.silu_mul` of tensors; has no gradient."""
    refuse_gradient("silu_mul", gate, up)
    return _silu_mul(gate, up)


@refuses_types
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


@refuses_types
def softmax(x: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.softmax` of a tensor, over its last dimension; has no gradient."""
    refuse_gradient("softmax", x)
    return _softmax(x)


@refuses_types
def lookup(ids: Tensor, table: Tensor) -> Tensor:
    """:func:`gpt2cupy.ops.lookup` of tensors; has no gradient."""
    refuse_gradient("lookup", table)
    return _lookup(ids, table)


@refuses_types
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
