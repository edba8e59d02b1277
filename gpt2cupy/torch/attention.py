"""Attention of tensors, and a module of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from ..ops.decode_attention import scratch_shape
from .launches import DTYPES, launches
from .operators import refuse_gradient, refuses_types


def _contiguous(q: Tensor, *rest: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


@launches(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? offsets, bool causal, "
    "float? scale, int q_offset) -> Tensor",
    _contiguous,
)
def _attention(
    q: Any,
    k: Any,
    v: Any,
    lengths: Any,
    offsets: Any,
    out: Any,
    causal: bool,
    scale: Any,
    offset: int,
) -> None:
    ops.attention(q, k, v, causal, scale, lengths, offset if offsets is None else offsets, out=out)


def _states(q: Tensor, k_cache: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    dtype = DTYPES.get(q.dtype)
    shape = None if dtype is None else scratch_shape(tuple(q.shape), tuple(k_cache.shape), dtype)
    return () if shape is None else (torch.empty(shape, dtype=torch.float32, device=q.device),)


@launches(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float? scale) "
    "-> Tensor",
    _contiguous,
    _states,
)
def _decode_attention(
    q: Any, k_cache: Any, v_cache: Any, lengths: Any, out: Any, *rest: Any
) -> None:
    *scratch, scale = rest
    states = scratch[0] if scratch else None
    ops.decode_attention(q, k_cache, v_cache, lengths, scale, out=out, scratch=states)


@refuses_types
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    scale: float | None = None,
    lengths: Tensor | None = None,
    q_offset: int | Tensor = 0,
) -> Tensor:
    """:func:`gpt2cupy.ops.attention` of tensors; has no gradient.

    They are [batch, tokens, heads, channels]: ``x.transpose(1, 2)`` of PyTorch's order, without
    a copy.
    """
    refuse_gradient("attention", q, k, v)
    given = isinstance(q_offset, Tensor)
    offsets, offset = (q_offset, 0) if given else (None, q_offset)
    return _attention(q, k, v, lengths, offsets, causal, scale, offset)


@refuses_types
def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float | None = None
) -> Tensor:
    """:func:`gpt2cupy.ops.decode_attention` of tensors; has no gradient."""
    refuse_gradient("decode_attention", q, k_cache, v_cache)
    return _decode_attention(q, k_cache, v_cache, lengths, scale)


class Attention(torch.nn.Module):
    """Self-attention over a sequence: projections of PyTorch's, attention of ours.

    Parameters
    ----------
    embed_dim : int
    num_heads : int
        Of ``embed_dim // num_heads`` channels each.
    num_kv_heads : int, optional
        Heads of keys and values, which divide ``num_heads``; as many by default.
    bias : bool
        Whether the projections have one.
    causal : bool
        Whether a token sees none of the later ones.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        bias: bool = True,
        causal: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        kv = num_heads if num_kv_heads is None else num_kv_heads
        if embed_dim % num_heads or num_heads % kv:
            raise InputError(
                f"{embed_dim} channels, {num_heads} heads and {kv} key heads do not divide",
                where="gpt2cupy.torch.Attention",
                remedy="num_heads must divide embed_dim, and num_kv_heads num_heads.",
            )
        self.head_dim = embed_dim // num_heads
        self.num_heads, self.num_kv_heads, self.causal = num_heads, kv, causal
        options = {"bias": bias, "device": device, "dtype": dtype}
        self.q_proj = torch.nn.Linear(embed_dim, embed_dim, **options)
        self.k_proj = torch.nn.Linear(embed_dim, kv * self.head_dim, **options)
        self.v_proj = torch.nn.Linear(embed_dim, kv * self.head_dim, **options)
        self.o_proj = torch.nn.Linear(embed_dim, embed_dim, **options)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """x [batch, tokens, embed_dim]; ``lengths`` are the tokens of each sequence that count."""
        q, k, v = (
            projection(x).unflatten(-1, (heads, self.head_dim))
            for projection, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        return self.o_proj(attention(q, k, v, self.causal, lengths=lengths).flatten(-2))
