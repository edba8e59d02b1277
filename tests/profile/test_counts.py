"""Bytes and operations against the sizes of real arrays."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from gpt2cupy import ops
from gpt2cupy.profile import components

DTYPES = st.sampled_from([np.dtype(np.float16), np.dtype(np.float32)])
SIZES = st.integers(1, 9)


@given(n=SIZES, m=SIZES, k=SIZES, dtype=DTYPES, epilogue=st.booleans())
def test_a_product_moves_its_arrays(n, m, k, dtype, epilogue):
    x, weight, out = np.ones((n, k), dtype), np.ones((m, k), dtype), np.ones((n, m), np.float32)
    touched, options = [x, weight, out], {}
    bias = None
    if epilogue:
        bias, residual = np.ones(m, np.float32), np.ones((n, m), np.float32)
        touched += [bias, residual]
        options = {"residual": residual}
    cost = ops.linear.cost(x, weight, bias, **options, out=out)
    assert cost.bytes == sum(array.nbytes for array in touched)
    multiplied = (x[:, None, :] * weight[None]).size
    assert cost.flops == 2 * multiplied


@given(n=SIZES, m=SIZES, dtype=DTYPES, given_parts=st.tuples(*[st.booleans()] * 3))
def test_an_epilogue_moves_its_arrays(n, m, dtype, given_parts):
    x = np.ones((n, m), dtype)
    bias = np.ones(m, dtype) if given_parts[0] else None
    residual = np.ones((n, m), dtype) if given_parts[1] else None
    activation = "relu" if given_parts[2] else None
    out = ops.bias_act(x, bias, activation, residual=residual)
    cost = ops.bias_act.cost(x, bias, activation, residual=residual)
    read = [array for array in (x, bias, residual) if array is not None]
    assert cost.bytes == sum(array.nbytes for array in read) + out.nbytes
    assert cost.flops == x.size * sum(given_parts)


@given(n=SIZES, c=SIZES, dtype=DTYPES)
def test_norms_move_their_arrays(n, c, dtype):
    x, weight, bias = np.ones((n, c), np.float32), np.ones(c, dtype), np.ones(c, dtype)
    out = ops.layer_norm(x, weight, bias)
    alone = ops.layer_norm.cost(x, weight, bias)
    assert alone.bytes == x.nbytes + weight.nbytes + bias.nbytes + out.nbytes
    assert alone == ops.layer_norm.cost(x, weight, bias, out=out)
    added = np.ones((n, c), dtype)
    both = ops.add_layer_norm.cost(added, x, weight, bias, out=(out, x))
    assert both == ops.add_layer_norm.cost(added, x, weight, bias)
    # The residual is read and written once more than in the norm alone: once, written.
    assert both.bytes == alone.bytes + added.nbytes + x.nbytes
    assert both.flops == alone.flops + x.size


@given(n=SIZES, m=SIZES, k=SIZES, dtype=DTYPES)
def test_a_product_with_its_norm_writes_nothing_between(n, m, k, dtype):
    x, norm = np.ones((n, k), np.float32), (np.ones(k, dtype), np.ones(k, dtype))
    weight, bias = np.ones((m, k), dtype), np.ones(m, dtype)
    out = ops.norm_linear(x, *norm, 1e-5, weight, bias)
    cost = ops.norm_linear.cost(x, *norm, 1e-5, weight, bias)
    assert cost.bytes == sum(a.nbytes for a in (x, *norm, weight, bias, out))
    parts = ops.layer_norm.cost(x, *norm).flops + ops.linear.cost(x.astype(dtype), weight).flops
    assert cost.flops == parts
    # A shift is read in place of both biases.
    shift = ops.shifted_bias(norm[1], weight, bias)
    given = ops.norm_linear.cost(x, *norm, 1e-5, weight, bias, shift=shift)
    assert given.bytes == cost.bytes - norm[1].nbytes - bias.nbytes + shift.nbytes
    assert given.flops == cost.flops


@given(n=SIZES, c=SIZES, dtype=DTYPES)
def test_an_embedding_moves_its_rows(n, c, dtype):
    wte, wpe = np.ones((20, c), dtype), np.ones((10, c), dtype)
    ids, positions = np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int32)
    out = ops.embedding(ids, positions, wte, wpe)
    cost = ops.embedding.cost(ids, positions, wte, wpe)
    read = ids.nbytes + positions.nbytes + wte[ids].nbytes + wpe[positions].nbytes
    assert cost.bytes == read + out.nbytes
    assert cost.flops == out.size


@given(batch=SIZES, heads=SIZES, size=SIZES, position=st.integers(0, 11), dtype=DTYPES)
def test_attention_moves_the_cache_before_it(batch, heads, size, position, dtype):
    k = np.ones((batch, heads, 12, size), dtype)
    v, qkv = k.copy(), np.ones((batch, 3 * heads * size), dtype)
    slots = np.arange(batch, dtype=np.int32)
    positions = np.full(batch, position, np.int32)
    out = ops.attention_decode(qkv, k, v, slots, positions, 1.0)
    cost = ops.attention_decode.cost(qkv, k, v, slots, positions, 1.0, context=position)
    earlier = k[:, :, :position].nbytes + v[:, :, :position].nbytes
    written = k[:, :, position].nbytes + v[:, :, position].nbytes + out.nbytes
    assert cost.bytes == qkv.nbytes + slots.nbytes + positions.nbytes + earlier + written
    # A multiplication and an addition per channel of every key, and of every value.
    assert cost.flops == 2 * (k[:, :, : position + 1].size + v[:, :, : position + 1].size)


@given(rows=SIZES, vocabulary=st.integers(1, 50), extras=st.booleans())
def test_sampling_reads_the_logits_once(rows, vocabulary, extras):
    logits = np.ones((rows, 64), np.float32)
    ints = np.zeros(rows, np.int32)
    params, ring = np.zeros((rows, 48), np.uint8), np.zeros((rows, 8, 16), np.uint8)
    more = {}
    if extras:
        more = {"counts": np.zeros((rows, 50), np.int32), "bias": np.zeros((rows, 50), np.float32)}
    state = ints, params, ints, ints, np.zeros(rows, np.uint32), ring
    cost = ops.sample.cost(logits, vocabulary, *state, **more)
    read = logits[:, :vocabulary].nbytes * (3 if extras else 1)
    small = params.nbytes + ring[:, 0].nbytes + 7 * ints.nbytes
    assert cost.bytes == read + small
    assert cost.flops == 3 * rows * vocabulary


def test_a_product_in_two_launches_is_counted_in_two():
    x, weight = np.ones((2, 8), np.float32), np.ones((4, 8), np.float32)
    bias, out = np.ones(4, np.float32), np.ones((2, 4), np.float32)
    options = {"activation": "relu", "residual": out, "out": out}
    product, epilogue = components.costs_of(ops.linear, (x, weight, bias), options, 2)
    assert product == ops.linear.cost(x, weight, out=out)
    assert epilogue == ops.bias_act.cost(out, bias, "relu", residual=out, out=out)
    whole = ops.linear.cost(x, weight, bias, residual=out, out=out)
    assert components.costs_of(ops.linear, (x, weight, bias), {"residual": out, "out": out}, 1) == [
        whole
    ]
