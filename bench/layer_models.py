"""Whole transformer layers composed of the ops, on NumPy or CuPy arrays."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from shared import np  # which lets a checkout be imported

from gpt2cupy import ops

Array = Any


class Shape(NamedTuple):
    """The widths of a layer."""

    width: int
    heads: int
    kv_heads: int
    inner: int

    @property
    def head_size(self) -> int:
        return self.width // self.heads


SHAPES = {
    "GPT-2": Shape(768, 12, 12, 3072),
    "Llama-2 7B": Shape(4096, 32, 32, 11008),
    "Llama-2 13B": Shape(5120, 40, 40, 13824),
    "Llama-2 70B": Shape(8192, 64, 8, 28672),
}
EPS = 1e-5


def ffn_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights of a feed-forward network."""
    c, f = shape.width, shape.inner
    return {"w1": (f, c), "b1": (f,), "w2": (c, f), "b2": (c,)}


def plain_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of a layer like GPT-2's: layer norms, attention with biases, GELU."""
    c = shape.width
    return {
        "ln1_w": (c,), "ln1_b": (c,), "qkv_w": (3 * c, c), "qkv_b": (3 * c,), "proj_w": (c, c),
        "proj_b": (c,), "ln2_w": (c,), "ln2_b": (c,), **ffn_sizes(shape),
    }  # fmt: skip


def llama_sizes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Of a Llama layer: the matrices of q, k and v lie one after the other, as gate and up do."""
    c, size = shape.width, shape.head_size
    return {
        "norm1": (c,), "qkv": ((shape.heads + 2 * shape.kv_heads) * size, c), "o": (c, c),
        "norm2": (c,), "gate_up": (2 * shape.inner, c), "down": (c, shape.inner),
    }  # fmt: skip


def drawn(sizes: dict[str, tuple[int, ...]], rng: np.random.Generator) -> Iterator[tuple[str, Any]]:
    """Random weights of these sizes by name, as a trained layer scales them, in float32."""
    for name, size in sizes.items():
        values = rng.standard_normal(size, dtype=np.float32)
        if len(size) == 2:
            values *= np.float32(size[1] ** -0.5)
        elif name.startswith(("ln", "norm")) and not name.endswith("_b"):
            values = 1 + values / 10
        yield name, values


class Ffn:
    """The feed-forward network alone: two products, tanh GELU."""

    def __init__(
        self, xp: Any, shape: Shape, w: dict[str, Array], batch: int, tokens: int, dtype: Any
    ) -> None:
        self.w = w
        self.y = xp.empty((batch, tokens, shape.width), dtype)
        self.scratch = xp.empty((batch * tokens, shape.inner), dtype)

    def __call__(self, x: Array) -> Array:
        """The network of x [B, T, C]."""
        w, to = self.w, {"out": self.y, "scratch": self.scratch}
        return ops.ffn(x, w["w1"], w["b1"], w["w2"], w["b2"], **to)


class Plain:
    """``x += proj(attention(norm(x)))``, then ``x + ffn(norm(x))``; causal."""

    def __init__(
        self, xp: Any, shape: Shape, w: dict[str, Array], batch: int, tokens: int, dtype: Any
    ) -> None:
        c, heads, size = shape.width, shape.heads, shape.head_size
        lead = batch, tokens
        self.w = w
        self.h, self.x, self.y = (xp.empty((*lead, c), dtype) for _ in range(3))
        self.qkv = xp.empty((*lead, 3 * heads, size), dtype)
        self.attended = xp.empty((*lead, heads, size), dtype)
        self.heads = heads
        self.scratch = xp.empty((batch * tokens, shape.inner), dtype)

    def __call__(self, x: Array) -> Array:
        """The layer of x [B, T, C]."""
        w, n = self.w, self.heads
        ops.layer_norm(x, w["ln1_w"], w["ln1_b"], EPS, out=self.h)
        qkv = self.qkv.reshape(*x.shape[:2], -1)
        ops.linear(self.h, w["qkv_w"], w["qkv_b"], out=qkv)
        q, k, v = (self.qkv[:, :, i * n : (i + 1) * n] for i in range(3))
        ops.attention(q, k, v, causal=True, out=self.attended)
        attended = self.attended.reshape(x.shape)
        ops.linear(attended, w["proj_w"], w["proj_b"], residual=x, out=self.x)
        ops.layer_norm(self.x, w["ln2_w"], w["ln2_b"], EPS, out=self.h)
        return ops.ffn(
            self.h, w["w1"], w["b1"], w["w2"], w["b2"],
            residual=self.x, out=self.y, scratch=self.scratch,
        )  # fmt: skip


class Llama:
    """RMS norms, rotary embedding, grouped heads, SwiGLU; causal, from position 0 on."""

    def __init__(
        self, xp: Any, shape: Shape, w: dict[str, Array], batch: int, tokens: int, dtype: Any
    ) -> None:
        c, heads, groups, size = shape.width, shape.heads, shape.kv_heads, shape.head_size
        lead = batch, tokens
        self.w, self.heads, self.groups = w, heads, groups
        self.h, self.x, self.y = (xp.empty((*lead, c), dtype) for _ in range(3))
        self.qkv = xp.empty((*lead, heads + 2 * groups, size), dtype)
        self.attended = xp.empty((*lead, heads, size), dtype)
        self.gate_up = xp.empty((*lead, 2 * shape.inner), dtype)
        self.inner = xp.empty((*lead, shape.inner), dtype)
        self.tables = [xp.asarray(table) for table in ops.rope_tables(tokens, size)]
        positions = np.tile(np.arange(tokens, dtype=np.int32), (batch, 1))
        self.positions = xp.asarray(positions)

    def __call__(self, x: Array) -> Array:
        """The layer of x [B, T, C]."""
        w, n, g = self.w, self.heads, self.groups
        ops.rms_norm(x, w["norm1"], EPS, out=self.h)
        ops.linear(self.h, w["qkv"], out=self.qkv.reshape(*x.shape[:2], -1))
        turned = self.qkv[:, :, : n + g]  # q and k in one launch
        ops.rope(turned, *self.tables, self.positions, out=turned)
        q, k, v = self.qkv[:, :, :n], self.qkv[:, :, n : n + g], self.qkv[:, :, n + g :]
        ops.attention(q, k, v, causal=True, out=self.attended)
        ops.linear(self.attended.reshape(x.shape), w["o"], residual=x, out=self.x)
        ops.rms_norm(self.x, w["norm2"], EPS, out=self.h)
        ops.linear(self.h, w["gate_up"], out=self.gate_up)
        half = self.inner.shape[-1]
        ops.silu_mul(self.gate_up[..., :half], self.gate_up[..., half:], out=self.inner)
        return ops.linear(self.inner, w["down"], residual=self.x, out=self.y)


LAYERS = {
    "ffn": (Ffn, ffn_sizes),
    "plain": (Plain, plain_sizes),
    "llama": (Llama, llama_sizes),
}


def operations(layer: str, shape: Shape, tokens: int) -> int:
    """Of the products of a layer, and of causal attention half of the T x T."""
    sizes = LAYERS[layer][1](shape)
    matrices = sum(s[0] * s[1] for s in sizes.values() if len(s) == 2)
    attention = 0 if layer == "ffn" else 2 * tokens * tokens * shape.width
    return 2 * tokens * matrices + attention
