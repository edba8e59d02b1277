"""Products of many rows: which calls they become, recorded and replayed, on NumPy's stand-ins."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import linear_kernels as product
from gpt2cupy.ops import reference
from gpt2cupy.ops.core import blas, blas_product, registry
from gpt2cupy.ops.core.tape import recorded, submit

linear = importlib.import_module("gpt2cupy.ops.linear")  # the package has a function of this name
ROWS, M, K = 17, 24, 16


class DeviceArray(np.ndarray):
    """An array of NumPy that shows its address as CuPy's do."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data)


def device_array(values) -> DeviceArray:
    return np.array(values).view(DeviceArray)


@pytest.fixture
def library(monkeypatch):
    """cuBLAS and the epilogue's kernel done by NumPy when they run; returns their names."""
    names = []

    def matmul(x, weight, bias, out, *, activation=None, residual=None, apart=None):
        def run():
            names.append("matmul")
            product = reference.linear(x, weight, bias, activation=activation)
            out[...] = product if residual is None else product + residual

        blas._check(x, weight, bias, out)
        submit(run)

    def bias_act(x, bias, activation, *, residual=None, out=None):
        def run():
            names.append("bias_act")
            reference.bias_act(x, bias, activation, residual=residual, out=out)

        submit(run)
        return out

    monkeypatch.setattr(registry, "_device_types", {DeviceArray})
    monkeypatch.setattr(linear, "device_empty", lambda s, d: device_array(np.full(s, np.nan, d)))
    monkeypatch.setattr(product, "has_mma", lambda: True)
    monkeypatch.setattr(blas, "matmul", matmul)
    monkeypatch.setattr(linear, "bias_act", bias_act)
    return names


def case(array):
    rng = np.random.default_rng(0)
    shapes = ((ROWS, K), (M, K), (M,), (ROWS, M))
    return [array(rng.standard_normal(shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("activation", [None, "relu", "gelu_tanh", "tanh"])
@pytest.mark.parametrize("residual", ["none", "beside", "out", "view of out"])
def test_a_recorded_product_reads_its_arrays_when_it_is_replayed(library, activation, residual):
    x, w, bias, before = case(device_array)
    out = device_array(np.zeros((ROWS, M), np.float32))
    given = {"none": None, "beside": before, "out": out, "view of out": out[:]}[residual]
    with recorded() as calls:
        assert ops.linear(x, w, bias, activation=activation, residual=given, out=out) is out
    assert library == []
    # What was there while it was recorded is not what counts.
    x += 1
    if given is not None:
        given[...] = before
    for call in calls:
        call()
    added = None if given is None else before
    expected = reference.linear(x, w, bias, activation=activation, residual=added)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    fused = activation is None or (residual == "none" and activation == "relu")
    assert library == (["matmul"] if fused else ["matmul", "bias_act"])


@pytest.mark.gpu
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("rows", [1, 2, ROWS])
@pytest.mark.parametrize("backend", ["ours", "cublas"])
def test_a_recorded_product_updates_in_place(rows, activation, backend):
    import cupy

    x, w, bias, before = case(cupy.asarray)
    x, before = x[:rows], before[:rows]
    out = cupy.zeros_like(before)
    with recorded() as calls:
        ops.linear(x, w, bias, activation=activation, residual=out[:], out=out, backend=backend)
    out[...] = before
    for call in calls:
        call()
    host = [a.get() for a in (x, w, bias)]
    expected = reference.linear(*host, activation=activation, residual=before.get())
    np.testing.assert_allclose(out.get(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "changed",
    [
        {"weight": np.zeros((M, K + 1), np.float32)},
        {"weight": np.zeros((M, K), np.float16)},
        {"weight": np.zeros((K, M), np.float32).T},
        {"x": np.zeros((ROWS, K), np.int32), "weight": np.zeros((M, K), np.int32)},
        {"bias": np.zeros(M + 1, np.float32)},
        {"bias": np.zeros(M, np.float16)},
        {"out": np.zeros((ROWS + 1, M), np.float32)},
        {"out": np.zeros((ROWS, M), np.float16)},
        {"out": np.zeros((M, ROWS), np.float32).T},
    ],
)
def test_the_library_is_not_given_what_does_not_fit(monkeypatch, changed):
    """Before a GPU is looked for: neither product runs past its arrays."""
    x, weight, bias, out = case(np.asarray)
    arrays = {"x": x, "weight": weight, "bias": bias, "out": out} | changed
    named = next(iter(changed))
    with pytest.raises(InputError, match=f"do not fit each other: {named} in x") as caught:
        blas.matmul(*arrays.values())
    assert caught.value.where == f"linear: {named}" and "float32" in caught.value.remedy
    if "bias" not in changed:
        with pytest.raises(InputError, match="do not fit each other"):
            blas.gemv(arrays["x"], arrays["weight"], arrays["out"])


@pytest.mark.parametrize(
    ("rows", "m", "k", "expected"),
    [
        # A block a multiprocessor, of 132, as near to that as K can be shared out.
        (17, 2304, 768, ("linear_rows_c2", (72, 1), 6, True)),
        (64, 768, 768, ("linear_rows_c8", (96, 1), 2, True)),
        (64, 768, 3072, ("linear_rows_c8", (96, 1), 6, True)),
        (64, 1280, 1280, ("linear_rows_c4", (80, 1), 5, True)),
        # Large weights: twice as many, with few stages.
        (64, 3072, 1024, ("linear_rows_c4", (192, 1), 4, False)),
        (64, 4800, 1600, ("linear_rows_c2", (150, 1), 4, False)),
        (64, 1600, 6400, ("linear_rows_c8", (200, 1), 4, False)),
        # More than a tile of rows: where blocks hold their share of K at once and half the chip
        # has one.
        (128, 768, 3072, ("linear_rows_c4", (48, 2), 12, True)),
        (128, 3072, 768, ("linear_rows_c1", (48, 2), 12, True)),
        (128, 2304, 768, ("linear_rows_c1", (36, 2), 12, True)),
        (256, 768, 768, ("linear_rows_c2", (24, 4), 6, True)),
        (256, 2304, 768, "library"),
        (256, 768, 3072, "library"),
        (257, 768, 768, "library"),
        (128, 1024, 4096, "library"),
        (128, 4800, 1600, "library"),
        (64, 50304, 768, "library"),
    ],
)
def test_tens_of_rows_are_spread_over_the_chip(library, monkeypatch, rows, m, k, expected):
    seen = []

    def launch(kernel, grid, block, args, *, elem, shared):
        seen.append((kernel.entry, grid, args[-1], shared > (227 << 10) // 2))

    monkeypatch.setattr(product, "launch", launch)
    monkeypatch.setattr(product, "has_clusters", lambda: True)
    monkeypatch.setattr(product, "sm_count", lambda: 132)
    monkeypatch.setattr(product, "shared_limit", lambda: 227 << 10)
    x, weight, out = (
        np.zeros(s, np.float16).view(DeviceArray) for s in ((rows, k), (m, k), (rows, m))
    )
    ops.linear(x, weight, out=out)
    assert (seen or library) == [expected if seen else "matmul"]
    assert bool(seen) == (expected != "library")


CHIPS = st.one_of(  # multiprocessors, bytes of shared memory, clusters
    st.tuples(st.integers(40, 160), st.sampled_from([99 << 10, 163 << 10]), st.just(False)),
    st.tuples(st.integers(40, 200), st.sampled_from([99 << 10, 227 << 10]), st.just(True)),
)


@given(st.integers(1, 300), st.integers(1, 60000), st.integers(1, 1024), CHIPS, st.booleans())
def test_a_plan_for_tens_of_rows_fits_the_chip(rows, m, eighths, chip, invariant):
    sms, shared, clusters = chip
    weight = np.lib.stride_tricks.as_strided(np.zeros(1, np.float16), (m, eighths * 8), (0, 0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(product, "sm_count", lambda: sms)
        patch.setattr(product, "shared_limit", lambda: shared)
        patch.setattr(product, "has_clusters", lambda: clusters)
        plan = product._rows_plan(rows, weight, invariant=invariant)
        alone = product._rows_plan(1, weight, invariant=True)
    assert plan.shared <= shared
    assert plan.tiles[0] * 64 >= m and plan.tiles[1] * 64 >= rows
    assert plan.split == 1 or clusters
    # The stages are enough for both groups of warps, or for all chunks.
    chunks = -(-eighths // 8)
    share = -(-chunks // plan.split)
    assert 1 <= plan.stages <= 12 and (plan.stages >= 2 or plan.stages >= share)
    assert plan.stages <= share
    if plan.spread:
        assert plan.tiles[0] * plan.tiles[1] * plan.split <= sms and 2 * plan.shared > shared
    if invariant:
        assert plan.split == alone.split


@pytest.mark.parametrize(
    ("rows", "dtype", "backend", "taken"),
    [
        (1, np.float32, "ours", False),
        (2, np.float32, "ours", True),
        (16, np.float32, "ours", True),
        (17, np.float32, "ours", False),
        (16, np.float16, "ours", False),
        (16, np.float32, "cublas", False),
    ],
)
def test_few_rows_of_float32_have_a_kernel_of_ours(rows, dtype, backend, taken):
    assert product.takes_fixed(rows, np.zeros((M, K), dtype), backend) is taken


@pytest.mark.parametrize(
    ("splits", "k", "taken"),
    [
        ([3, 8, 2], 768, 1),
        ([8, 3], 768, 0),
        ([1, 12], 768, 0),  # another kind of kernel
        ([3, 2, 1], 768, 0),  # none has shorter sums
        ([33, 48], 3072, 0),
    ],
)
def test_the_library_shares_out_long_sums(splits, k, taken):
    assert blas_product.of_short_sums(splits, k) == taken
