"""Every op against its float64 reference, on NumPy and on the GPU, by the error rule."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from builders import host
from error_rule import DTYPES, check
from op_checks import SEEDS, check_together, draw, on, torch_with_gpu, wide

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import linear_kernels, reference
from gpt2cupy.ops.core import compiler, device, launch

linear = importlib.import_module("gpt2cupy.ops.linear")  # the package has a function of this name
AWKWARD = [1, 19, 99, 128, 768, 989, 1028, 1600, 2052]


@pytest.mark.parametrize("channels", AWKWARD)
@pytest.mark.parametrize("outlier", [0.0, 3000.0])
def test_layer_norm(xp, dtype, channels, outlier):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x = draw(rng, (5, channels), np.float32)
        x[:, channels // 2] += outlier
        w, b = draw(rng, channels, dtype), draw(rng, channels, dtype)
        ours = ops.layer_norm(*on(xp, x, w, b))
        assert ours.dtype == dtype
        exact = reference.layer_norm(*wide(x, w, b))
        found.append((host(ours), reference.layer_norm(x, w, b), exact))
    check_together(found, dtype, "layer_norm")


@pytest.mark.parametrize("rows", [1, 2, 7, 16, 17])
@pytest.mark.parametrize(
    ("m", "k"), [(1, 8), (19, 99), (99, 768), (2304, 768), (768, 3072), (1600, 6400)]
)
@pytest.mark.parametrize("backend", ["ours", "cublas", "invariant"])
@pytest.mark.parametrize("activation", [None, "gelu_tanh"])
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear(xp, dtype, rows, m, k, backend, activation, with_residual):
    linear_case(xp, dtype, rows, m, k, backend, activation, with_residual)


@pytest.mark.parametrize(
    ("m", "k"), [(1280, 1280), (99, 1312), (1600, 1600), (1600, 2056), (1280, 5120)]
)
@pytest.mark.parametrize("with_residual", [False, True])
def test_linear_of_one_long_row(xp, dtype, m, k, with_residual):
    """Products of large models, and rows that the warps of a block cannot share out evenly."""
    linear_case(xp, dtype, 1, m, k, "ours", None, with_residual)


def linear_case(xp, dtype, rows, m, k, backend, activation, with_residual):
    found = []
    out = np.dtype(np.float32) if with_residual else dtype
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, w = draw(rng, (rows, k), dtype), draw(rng, (m, k), dtype, k**-0.5)
        bias = draw(rng, m, out)
        residual = draw(rng, (rows, m), out) if with_residual else None
        options = {"activation": activation}
        exact = reference.linear(*wide(x, w, bias), **options, residual=wide(residual)[0])
        baseline = reference.linear(x, w, bias, **options, residual=residual)
        target = None if residual is None else xp.array(residual)
        ours = ops.linear(
            *on(xp, x, w, bias), **options, residual=target, out=target, backend=backend
        )
        assert ours.dtype == out
        # PyTorch would round the result, which is also what the rule's baseline does.
        found.append((host(ours), baseline.astype(dtype), exact))
    check_together(found, dtype, f"linear {backend}")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 63, 64, 65, 128])
@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize(("m", "k"), [(1, 8), (67, 200), (130, 1000), (768, 3072)])
@pytest.mark.parametrize("wide_out", [False, True])
def test_a_product_of_tens_of_rows_by_clusters(dtype, rows, split, m, k, wide_out, monkeypatch):
    monkeypatch.setattr(linear_kernels, "_rows_split", lambda *given: split)
    linear_rows_case(dtype, rows, m, k, wide_out, monkeypatch)


@pytest.fixture
def plain_sm_90(monkeypatch):
    """A GPU whose kernels do without what only that chip has, as on newer ones."""

    def forget():
        launch._function.cache_clear()
        launch._load.cache_clear()
        launch.THREAD.known.clear()
        launch.THREAD.plans.clear()
        launch._requested.cache_clear()

    monkeypatch.setattr(compiler, "OWN_FEATURES", {})
    forget()
    yield
    forget()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 64])
@pytest.mark.parametrize("split", [1, 4])
def test_a_product_of_tens_of_rows_as_on_newer_chips(dtype, rows, split, plain_sm_90, monkeypatch):
    monkeypatch.setattr(linear_kernels, "_rows_split", lambda *given: split)
    linear_rows_case(dtype, rows, 130, 1000, False, monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 64])
def test_a_product_of_tens_of_rows_with_few_stages_and_an_odd_number(dtype, rows, monkeypatch):
    """Stages change from one group of warps to the other with each round."""
    monkeypatch.setattr(linear_kernels, "_rows_split", lambda *given: 1)
    monkeypatch.setattr(linear_kernels, "shared_limit", lambda: 99 << 10)
    linear_rows_case(dtype, rows, 130, 1000, False, monkeypatch)


def linear_rows_case(dtype, rows, m, k, wide_out, monkeypatch):
    import cupy

    if dtype == np.float32 or not device.has_clusters():
        pytest.skip("the library's product is taken")
    monkeypatch.setattr(linear, "takes_linear_rows", lambda *given: True)
    out = np.dtype(np.float32) if wide_out else dtype
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, w = draw(rng, (rows, k), dtype), draw(rng, (m, k), dtype, k**-0.5)
        bias, residual = draw(rng, m, out), draw(rng, (rows, m), out)
        exact = reference.linear(*wide(x, w, bias), activation="gelu_tanh", residual=residual)
        target, twice = cupy.full((rows, m), np.nan, out), cupy.array(residual)
        args = on(cupy, x, w, bias)
        ops.linear(*args, activation="gelu_tanh", residual=twice, out=target)
        ops.linear(*args, activation="gelu_tanh", residual=twice, out=twice)
        np.testing.assert_array_equal(host(target), host(twice))
        baseline = reference.linear(x, w, bias, activation="gelu_tanh", residual=residual)
        found.append((host(target), baseline.astype(dtype), exact))
    check_together(found, dtype, "linear_rows")


@pytest.mark.parametrize("rows", [1, 3, 16, 70])
@pytest.mark.parametrize(
    ("m", "k"), [(1, 8), (19, 99), (2304, 768), (99, 1600), (50304, 256), (7, 2048), (8, 2056)]
)
@pytest.mark.parametrize("outlier", [0.0, 3000.0])
def test_norm_linear(xp, dtype, rows, m, k, outlier):
    norm_linear_case(xp, dtype, rows, m, k, outlier)


@pytest.mark.parametrize(("m", "k"), [(3840, 1280), (99, 1312), (6400, 1600)])
@pytest.mark.parametrize("outlier", [0.0, 3000.0])
def test_norm_linear_of_one_long_row(xp, dtype, m, k, outlier):
    norm_linear_case(xp, dtype, 1, m, k, outlier)


@pytest.mark.parametrize(("m", "k"), [(99, 768), (99, 1600)])
def test_norm_linear_into_float32(xp, dtype, m, k):
    """One row, as the logits are made."""
    norm_linear_case(xp, dtype, 1, m, k, 0.0, into=np.dtype(np.float32))


@pytest.mark.parametrize(("m", "k"), [(99, 768), (2304, 768), (13, 1024), (99, 1600), (50304, 256)])
@pytest.mark.parametrize("into", [None, "float32"])
@pytest.mark.parametrize("outlier", [0.0, 3000.0])
def test_norm_linear_given_its_shift(xp, dtype, m, k, into, outlier):
    """One row, as in a step; where no kernel has a use for the shift it changes nothing."""
    into = None if into is None else np.dtype(into)
    norm_linear_case(xp, dtype, 1, m, k, outlier, into=into, shifted=True)


def test_a_shift_changes_nothing_on_numpy():
    rng = np.random.default_rng(0)
    x, w, norm_w = (draw(rng, shape, np.float32) for shape in ((1, 32), (7, 32), 32))
    args = (x, norm_w, draw(rng, 32, np.float32), 1e-5, w, draw(rng, 7, np.float32))
    wrong = np.full(7, np.nan, np.float32)
    np.testing.assert_array_equal(ops.norm_linear(*args, shift=wrong), ops.norm_linear(*args))


@pytest.mark.parametrize(("m", "k"), [(1, 8), (19, 99), (2304, 768), (99, 1600)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_shifted_bias(xp, dtype, m, k, with_bias):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        norm_b, w = draw(rng, k, dtype), draw(rng, (m, k), dtype, k**-0.5)
        bias = draw(rng, m, dtype) if with_bias else None
        exact = reference.shifted_bias(*wide(norm_b, w, bias))
        assert exact.dtype == np.float64
        target = xp.empty(m, np.float32) if seed % 2 else None
        ours = ops.shifted_bias(*on(xp, norm_b, w, bias), out=target)
        assert ours.dtype == np.float32 and (target is None or ours is target)
        found.append((host(ours), reference.shifted_bias(norm_b, w, bias), exact))
    check_together(found, np.dtype(np.float32), "shifted_bias")


def norm_linear_case(xp, dtype, rows, m, k, outlier, into=None, shifted=False):
    found, out = [], dtype if into is None else into
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, w = draw(rng, (rows, k), np.float32), draw(rng, (m, k), dtype, k**-0.5)
        x[:, k // 2] += outlier
        norm_w, norm_b = draw(rng, k, dtype), draw(rng, k, dtype)
        bias = draw(rng, m, dtype).astype(out)
        args = (x, norm_w, norm_b, 1e-5, w, bias)
        exact = reference.norm_linear(*wide(x, norm_w, norm_b), 1e-5, *wide(w, bias))
        target = None if into is None else xp.empty((rows, m), into)
        shift = ops.shifted_bias(*on(xp, norm_b, w, bias)) if shifted else None
        ours = ops.norm_linear(*on(xp, *args[:3]), 1e-5, *on(xp, w, bias), out=target, shift=shift)
        assert ours.dtype == out
        found.append((host(ours), norm_linear_baseline(xp, *args), exact))
    check_together(found, dtype, "norm_linear")


def norm_linear_baseline(xp, *args):
    """PyTorch's on the GPU under test where it is installed; else ours on NumPy."""
    if xp is np or not (torch := torch_with_gpu()):
        return reference.norm_linear(*args)
    x, norm_w, norm_b, eps, w, bias = (
        torch.tensor(a.astype(np.float32), device="cuda") if isinstance(a, np.ndarray) else a
        for a in args
    )
    kind = getattr(torch, args[4].dtype.name)
    h = torch.nn.functional.layer_norm(x, x.shape[1:], norm_w, norm_b, eps).to(kind)
    return torch.nn.functional.linear(h, w.to(kind), bias.to(kind)).float().cpu().numpy()


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf", "relu", "silu", "tanh"])
def test_bias_act(xp, dtype, activation):
    rng = np.random.default_rng(0)
    x, b = draw(rng, (7, 99), dtype, 4.0), draw(rng, 99, dtype)
    x[0, :4] = [-30, 30, 0, -0.0]
    exact = reference.bias_act(*wide(x, b), activation)
    ours = ops.bias_act(*on(xp, x, b), activation)
    check(host(ours), reference.bias_act(x, b, activation), exact, dtype, activation)


def test_embedding(xp, dtype):
    rng = np.random.default_rng(0)
    wte, wpe = draw(rng, (99, 19), dtype), draw(rng, (10, 19), dtype)
    ids, positions = np.array([0, 98, 7], np.int32), np.array([9, 0, 3], np.int32)
    ours = ops.embedding(*on(xp, ids, positions, wte, wpe))
    expected = wte[ids].astype(np.float32) + wpe[positions].astype(np.float32)
    np.testing.assert_array_equal(host(ours), expected)


def test_last_rows(xp, dtype):
    rng = np.random.default_rng(0)
    x, attended = draw(rng, (9, 40), np.dtype(np.float32)), draw(rng, (9, 40), dtype)
    starts = np.array([0, 4, 4, 9], np.int32)  # the second sequence has no tokens
    x, attended, starts = on(xp, x, attended, starts)
    y, out = xp.zeros((3, 40), np.float32), xp.zeros((3, 40), attended.dtype)
    ops.last_rows(x, attended, starts, out=(y, out))
    for own, whole in ((y, x), (out, attended)):
        np.testing.assert_array_equal(host(own), host(whole)[[3, 3, 8]])
    with pytest.raises(InputError, match="3 starts do not fit 3 rows"):
        ops.last_rows(x, attended, starts[:3], out=(y, out))
    ops.last_rows(x, attended, starts * 0, out=(y, out))  # nobody has any
    np.testing.assert_array_equal(host(y), host(x)[[0, 0, 0]])


@pytest.mark.gpu
def test_embedding_outside_its_tables_is_zero():
    import cupy as cp

    wte = cp.ones((9, 8), np.float32)
    ids = cp.asarray(np.array([-1, 9, 0, 0], np.int32))
    positions = cp.asarray(np.array([0, 0, -1, 9], np.int32))
    assert not ops.embedding(ids, positions, wte, wte).any()


@pytest.mark.gpu
def test_what_a_kernel_cannot_take_is_refused():
    import cupy as cp

    x, w = cp.ones((4, 64), np.float32), cp.ones(64, np.float32)
    with pytest.raises(InputError, match="float64"):
        ops.layer_norm(x.astype(np.float64), w, w)
    with pytest.raises(InputError, match="not contiguous"):
        ops.layer_norm(cp.ones((64, 4), np.float32).T, w, w)
    with pytest.raises(InputError, match=r"weight is float32\[32\]"):
        ops.layer_norm(x, w[:32], w)
    with pytest.raises(InputError, match=r"weight is float32\[8, 32\]"):
        ops.linear(x, cp.ones((8, 32), np.float32))
    with pytest.raises(InputError, match="aligned"):
        ops.layer_norm(cp.ones(4 * 64 + 1, np.float32)[1:].reshape(4, 64), w, w)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_the_ladders_agree_with_their_last_step(dtype_name):
    import cupy as cp

    from gpt2cupy.ops.cached_attention import ATTENTION_NAIVE
    from gpt2cupy.ops.core.launch import launch
    from gpt2cupy.ops.linear_kernels import GEMV, GEMV_NAIVE, GEMV_SCALAR
    from gpt2cupy.ops.norm import LAYER_NORM_NAIVE

    dtype = DTYPES[dtype_name]
    rng = np.random.default_rng(0)
    x, w, b = draw(rng, (1, 768), dtype), draw(rng, (99, 768), dtype, 0.03), draw(rng, 99, dtype)
    exact = reference.linear(*wide(x, w, b))
    baseline = reference.linear(x, w, b)
    for kernel, blocks in ((GEMV_NAIVE, 1), (GEMV_SCALAR, 25), (GEMV, 13)):
        out = cp.empty((1, 99), dtype)
        args = (*on(cp, x, w, b), None, out, 0)
        launch(kernel[dtype == np.float32], (blocks,), (128,), args, elem=dtype)
        check(out.get(), baseline, exact, dtype, "gemv ladder")

    rows = draw(rng, (5, 99), np.float32)
    weight = draw(rng, 99, dtype)
    out = cp.empty((5, 99), dtype)
    args = (*on(cp, rows, weight, weight), out, 1e-5)
    launch(LAYER_NORM_NAIVE, (1,), (32,), args, elem=dtype)
    exact = reference.layer_norm(*wide(rows, weight, weight))
    check(out.get(), reference.layer_norm(rows, weight, weight), exact, dtype, "norm ladder")

    qkv = draw(rng, (40, 3 * 128), dtype)
    k = np.zeros((1, 2, 40, 64), dtype)
    ints = [np.array(values, np.int32) for values in ([0, 40], [0], [0])]
    out = cp.empty((40, 128), dtype)
    args = (*on(cp, qkv, k, k.copy(), *ints), out, 0.125)
    launch(ATTENTION_NAIVE, (40, 2, 1), (32,), args, elem=dtype, head_size=64)
    exact = reference.attention_prefill(*wide(qkv, k, k), *ints, 40, 0.125)
    baseline = reference.attention_prefill(qkv, k.copy(), k.copy(), *ints, 40, 0.125)
    check(out.get(), baseline, exact, dtype, "attention ladder")
