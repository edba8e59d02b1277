"""Weight-only int8: the values, and the products over them."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import pytest
from builders import host
from error_rule import DTYPES, check
from hypothesis import given
from hypothesis import strategies as st
from op_checks import SEEDS, check_together, draw, on

from gpt2cupy import ops
from gpt2cupy.decode import graph
from gpt2cupy.errors import InputError
from gpt2cupy.ops import quantized, reference
from gpt2cupy.ops.core import tape
from gpt2cupy.ops.core.tape import recorded
from gpt2cupy.profile import components
from gpt2cupy.quantize import (
    GROUP,
    QuantizedMatrix,
    dequantize,
    quantize,
    scale_shape,
)

shapes = st.tuples(st.integers(1, 20), st.integers(1, 200))


@functools.lru_cache(maxsize=8)
def drawn_matrix(m, k, seed=0):
    return quantize(draw(np.random.default_rng(seed), (m, k), np.float32, k**-0.5))


# ------------------------------------------------------------------------------------------------
# values


@given(shapes, st.integers(0, 9), st.sampled_from([1e-30, 0.02, 3e4]))
def test_every_weight_is_within_half_a_step(shape, seed, size):
    weights = draw(np.random.default_rng(seed), shape, np.float32, size)
    found = quantize(weights)
    assert found.values.dtype == np.int8 and found.scales.shape == scale_shape(shape)
    assert np.abs(found.values.astype(int)).max() <= 127
    steps = np.repeat(found.scales.astype(np.float64).T, GROUP, axis=1)[:, : shape[1]]
    apart = np.abs(dequantize(found, np.float64) - weights)
    assert (apart <= 0.5 * steps * (1 + 1e-6)).all()
    # The largest of each group sets its step: no finer one would do, but for the scale's rounding.
    for group, scales in enumerate(found.scales.astype(np.float64)):
        largest = np.abs(weights[:, group * GROUP : (group + 1) * GROUP]).max(axis=1)
        np.testing.assert_allclose(scales * 127, largest, rtol=2.0**-8)


@given(shapes, st.integers(0, 9))
def test_dequantised_values_are_exact_in_float32(shape, seed):
    found = quantize(draw(np.random.default_rng(seed), shape))
    np.testing.assert_array_equal(dequantize(found), dequantize(found, np.float64))


def test_groups_of_zeros_and_of_numbers_too_small_for_a_scale():
    weights = np.zeros((2, 2 * GROUP), np.float32)
    weights[1, 0] = 1e-45
    weights[0, GROUP] = -3
    found = dequantize(quantize(weights))
    assert found[0, GROUP] == pytest.approx(-3, rel=0.5 / 127)
    found[0, GROUP] = 0
    assert not found.any()


def test_scales_that_do_not_fit_are_refused():
    values = np.zeros((4, 100), np.int8)
    with pytest.raises(InputError, match="do not fit values") as caught:
        QuantizedMatrix(values, np.zeros((4, 2), ml_dtypes.bfloat16))
    assert "[K / 64, M]" in caught.value.remedy


@pytest.mark.parametrize("array", ["float32", "float16", "bfloat16"])
def test_stored_halves_are_quantised_from_their_own_values(array):
    weights = draw(np.random.default_rng(0), (5, 70), DTYPES[array])
    ours, wide = quantize(weights), quantize(weights.astype(np.float32))
    np.testing.assert_array_equal(ours.values, wide.values)
    np.testing.assert_array_equal(ours.scales, wide.scales)


@pytest.mark.gpu
@pytest.mark.parametrize(("m", "k"), [(1, 8), (19, 99), (50, 768), (16, 6400)])
def test_the_gpu_makes_the_same_bytes(m, k, dtype):
    import cupy

    rng = np.random.default_rng(0)
    weights = draw(rng, (m, k), np.float32, 0.02)
    weights[0] = 0
    weights[-1, : k // 2] *= np.float32(1e-38)
    expected = quantize(weights)
    whole = QuantizedMatrix(
        cupy.zeros((m + 3, k), np.int8), cupy.zeros(scale_shape((m + 3, k)), expected.scales.dtype)
    )
    ops.quantize(cupy.asarray(weights), out=whole, first=2)
    np.testing.assert_array_equal(host(whole.values)[2:-1], expected.values)
    bits = np.uint16
    np.testing.assert_array_equal(
        host(whole.scales)[:, 2:-1].view(bits), expected.scales.view(bits)
    )
    assert not whole.values[:2].any() and not whole.values[-1].any()
    (ours,) = on(cupy, expected)
    np.testing.assert_array_equal(
        host(ops.dequantize(ours, dtype)).astype(np.float32),
        dequantize(expected, dtype).astype(np.float32),
    )


# ------------------------------------------------------------------------------------------------
# products

# M of 8 and K of 16 at least; those that are no multiples of them are dequantised.
SIZES = [(19, 99), (20, 80), (40, 80), (2304, 768), (200, 1600), (200, 6400)]


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17, 64, 65])
@pytest.mark.parametrize(("m", "k"), SIZES)
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear(xp, dtype, rows, m, k, activation, with_residual):
    found = []
    out = np.dtype(np.float32) if with_residual else dtype
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, w, bias = draw(rng, (rows, k), dtype), drawn_matrix(m, k, seed), draw(rng, m, out)
        residual = draw(rng, (rows, m), out) if with_residual else None
        wide = dequantize(w, np.float64)
        exact = reference.linear(
            x.astype(np.float64), wide, bias.astype(np.float64), activation=activation,
            residual=None if residual is None else residual.astype(np.float64),
        )  # fmt: skip
        rounded = dequantize(w, dtype)
        baseline = reference.linear(x, rounded, bias, activation=activation, residual=residual)
        target = None if residual is None else xp.array(residual)
        args = on(xp, x, w, bias)
        ours = ops.linear(*args, activation=activation, residual=target, out=target)
        assert ours.dtype == out
        found.append((host(ours), baseline.astype(dtype), exact))
    check_together(found, dtype, "linear int8")


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize(
    ("m", "k"), [(19, 99), (40, 80), (2304, 768), (50304, 256), (200, 1600), (8, 2064)]
)
@pytest.mark.parametrize("outlier", [0.0, 3000.0])
def test_norm_linear(xp, dtype, rows, m, k, outlier):
    norm_linear_case(xp, dtype, rows, m, k, outlier)


def test_norm_linear_into_float32(xp, dtype):
    """One row, as the logits are made."""
    norm_linear_case(xp, dtype, 1, 40, 80, 0.0, into=np.dtype(np.float32))


def norm_linear_case(xp, dtype, rows, m, k, outlier, into=None):
    found, out = [], dtype if into is None else into
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, w = draw(rng, (rows, k)), drawn_matrix(m, k, seed)
        x[:, k // 2] += outlier
        norm_w, norm_b = draw(rng, k, dtype), draw(rng, k, dtype)
        bias = draw(rng, m, dtype).astype(out)
        wide = [a.astype(np.float64) for a in (x, norm_w, norm_b)]
        exact = reference.norm_linear(
            *wide, 1e-5, dequantize(w, np.float64), bias.astype(np.float64)
        )
        baseline = reference.norm_linear(x, norm_w, norm_b, 1e-5, dequantize(w, dtype), bias)
        target = None if into is None else xp.empty((rows, m), into)
        ours = ops.norm_linear(*on(xp, x, norm_w, norm_b), 1e-5, *on(xp, w, bias), out=target)
        assert ours.dtype == out
        found.append((host(ours), baseline, exact))
    check_together(found, dtype, "norm_linear int8")


def test_embedding(xp, dtype):
    rng = np.random.default_rng(0)
    wte, wpe = drawn_matrix(99, 80), draw(rng, (10, 80), dtype)
    ids, positions = np.array([0, 98, 7], np.int32), np.array([9, 0, 3], np.int32)
    ours = ops.embedding(*on(xp, ids, positions, wte, wpe))
    expected = dequantize(wte)[ids] + wpe[positions].astype(np.float32)
    np.testing.assert_array_equal(host(ours), expected)


@pytest.mark.gpu
def test_an_id_outside_the_table_gives_zeros():
    import cupy as cp

    (wte,) = on(cp, quantize(np.ones((9, 16), np.float32)))
    ids = cp.asarray(np.array([-1, 9, 0, 0], np.int32))
    positions = cp.asarray(np.array([0, 0, -1, 9], np.int32))
    assert not ops.embedding(ids, positions, wte, cp.ones((9, 16), np.float32)).any()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_one_value_that_is_no_number_makes_the_row_none(rows, dtype):
    """Not a finite result from whole numbers that stand for nothing."""
    import cupy

    w = drawn_matrix(16, 768)
    for bad in (np.nan, np.inf):
        x = np.ones((rows, 768), dtype)
        x[0, 300] = bad
        found = host(ops.linear(*on(cupy, x, w))).astype(np.float32)
        assert not np.isfinite(found[0]).any()
        assert np.isfinite(found[1:]).all()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, 17, 70])
def test_the_same_bits_in_every_run(rows):
    import cupy

    rng = np.random.default_rng(0)
    x, w = on(cupy, draw(rng, (rows, 1600), np.float16), drawn_matrix(1600, 1600))
    first = host(ops.linear(x, w))
    for _ in range(20):
        np.testing.assert_array_equal(host(ops.linear(x, w)), first)


@pytest.mark.gpu
def test_a_recorded_product_dequantises_into_the_scratch_it_was_given():
    import cupy

    rng = np.random.default_rng(0)
    x, w = draw(rng, (70, 80), np.float16), drawn_matrix(24, 80)
    scratch = cupy.zeros(24 * 80 + 5, np.float16)
    (xs, ws), out = on(cupy, x, w), cupy.zeros((70, 24), np.float16)
    with recorded() as calls:
        ops.linear(xs, ws, out=out, scratch=scratch)
    assert not scratch.any()
    for launch in calls:
        launch()
    np.testing.assert_array_equal(host(scratch)[: 24 * 80], dequantize(w, np.float16).ravel())
    assert not scratch[24 * 80 :].any() and out.any()


@pytest.mark.parametrize(
    ("rows", "shape", "dtype", "direct"),
    [
        (1, (24, 80), "float32", True),
        (2, (24, 80), "float32", False),
        (64, (24, 80), "float16", True),
        (65, (24, 80), "float16", False),
        (1, (24, 72), "float16", False),
        (1, (20, 80), "float16", False),
        (1, (24, 16384), "float16", False),
    ],
)
def test_who_reads_int8_itself(monkeypatch, rows, shape, dtype, direct):
    monkeypatch.setattr(quantized, "has_mma", lambda: True)
    asked = rows, shape, np.dtype(dtype)
    fits = shape == (24, 80)
    assert quantized.reads_int8(*asked, "ours") is direct
    assert quantized.reads_int8(*asked, "invariant") is (fits and dtype == "float16")
    assert not quantized.reads_int8(*asked, "cublas")
    monkeypatch.setattr(quantized, "has_mma", lambda: False)
    assert quantized.reads_int8(*asked, "ours") is (direct and rows == 1)
    assert not quantized.reads_int8(*asked, "invariant")


def test_no_kernel_of_a_graph_starts_before_a_matrix_is_dequantised():
    """They load weights before they wait, and these are written by the kernel before."""
    first, second = (tape.Launch(None, (1,), (32,), (), overlaps=True) for _ in range(2))
    assert graph._may_overlap(first, second) and not graph._may_overlap(None, second)
    first.writes_weights = quantized.DEQUANTIZE.writes_weights
    assert not graph._may_overlap(first, second)


@pytest.mark.parametrize(("m", "k"), [(20, 80), (40, 80), (24, 1600)])
def test_invariant_rows_have_the_same_bits_in_any_number(xp, dtype, m, k):
    rng, w = np.random.default_rng(0), drawn_matrix(m, k)
    x, bias = draw(rng, (70, k), dtype), draw(rng, m, dtype)
    (ws,) = on(xp, w)
    whole = ops.linear(*on(xp, x), ws, *on(xp, bias), backend="invariant")
    for rows in (1, 2, 16, 17, 33):
        part = ops.linear(*on(xp, x[-rows:]), ws, *on(xp, bias), backend="invariant")
        np.testing.assert_array_equal(host(part), host(whole)[-rows:])
    exact = reference.linear(
        x.astype(np.float64), dequantize(w, np.float64), bias.astype(np.float64)
    )
    baseline = reference.linear(x, dequantize(w, dtype), bias).astype(dtype)
    check(host(whole), baseline, exact, dtype, "invariant int8")


@pytest.mark.parametrize("source", ["gemv_int8.cu", "skinny_int8.cu"])
def test_a_group_is_the_kernels_group(source):
    from gpt2cupy.ops.core import cuda_source

    assert f"constexpr int GROUP = {GROUP};" in dict(cuda_source.source_closure(source))["int8.cuh"]


def test_a_product_is_counted_with_a_byte_per_weight():
    x, w = np.zeros((1, 128), np.float16), quantize(np.ones((24, 128), np.float32))
    cost = ops.linear.cost(x, w)
    assert cost.bytes == x.nbytes + 24 * 128 + 24 * 2 * 2 + 24 * 2
    assert cost.flops == 2 * 24 * 128
    # Dequantised and multiplied: the bytes stand at the first of the launches.
    parts = components.costs_of(ops.linear, (x, w), {"out": np.zeros((1, 24), np.float16)}, 2)
    assert parts[0] is not None and parts[1] is None
