"""linear as others call it, its float32 by split products, and ffn: against float64."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from builders import host
from error_rule import DTYPES, check
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import SEEDS, check_together, draw, on, torch_with_gpu, wide

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import linear_split, reference, reference_product
from gpt2cupy.ops.core.device import current_device, device_arch

F32 = np.dtype(np.float32)


def ffn_arrays(rng, lead, c, f, m, dtype):
    x, w1 = draw(rng, (*lead, c), dtype), draw(rng, (f, c), dtype, max(c, 1) ** -0.5)
    w2 = draw(rng, (m, f), dtype, max(f, 1) ** -0.5)
    return [x, w1, draw(rng, f, dtype), w2, draw(rng, m, dtype)], draw(rng, (*lead, m), dtype)


@pytest.mark.parametrize("lead", [(1,), (2,), (8,), (3, 3), (19,), (1, 99), ()])
@pytest.mark.parametrize(("c", "f", "m"), [(1, 19, 1), (59, 99, 59), (64, 256, 64), (768, 989, 19)])
@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu_erf"])
def test_ffn(xp, dtype, lead, c, f, m, activation):
    found = []
    for seed in SEEDS:
        given_, residual = ffn_arrays(np.random.default_rng(seed), lead, c, f, m, dtype)
        options = {"activation": activation}
        exact = reference.ffn(*wide(*given_), **options, residual=wide(residual)[0])
        baseline = reference.ffn(*given_, **options, residual=residual)
        added = xp.array(residual)
        ours = ops.ffn(*on(xp, *given_), **options, residual=added)
        assert ours.dtype == dtype and ours.shape == (*lead, m)
        again = ops.ffn(*on(xp, *given_), **options, residual=added, out=added)
        assert again is added
        found += [(host(ours), baseline, exact), (host(again), baseline, exact)]
    check_together(found, dtype, f"ffn {lead} {c} {f} {m}")


@pytest.mark.parametrize("rows", [1, 5, 17])
def test_ffn_without_biases_into_what_is_given(xp, dtype, rows):
    (x, w1, _, w2, _), _ = ffn_arrays(np.random.default_rng(0), (rows,), 64, 128, 32, dtype)
    args = [*on(xp, x, w1), None, *on(xp, w2), None]
    out, scratch = xp.empty((rows, 32), np.float32), xp.empty((rows, 128), dtype)
    assert ops.ffn(*args, activation="silu", out=out, scratch=scratch) is out
    exact = reference.ffn(*wide(x, w1, None, w2, None), activation="silu")
    hidden = reference.linear(x, w1, activation="silu")
    baseline = reference.linear(hidden, w2)
    check(host(out), baseline, exact, dtype, "ffn")


@functools.cache
def real_weights(c, f):
    """Weights of a layer in float32, on the host: they are drawn once."""
    return ffn_arrays(np.random.default_rng(0), (0,), c, f, c, F32)[0][1:]


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 3, 8, 16, 64, 257])
@pytest.mark.parametrize(("c", "f"), [(768, 3072), (4096, 11008)])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_ffn_of_real_widths(rows, c, f, kind):
    """Beside PyTorch's three operators where it is installed, else beside cuBLAS and ours."""
    import cupy

    dtype, rng = DTYPES[kind], np.random.default_rng(1)
    weights = [cupy.asarray(w).astype(dtype) for w in real_weights(c, f)]
    x, residual = (cupy.asarray(draw(rng, (rows, c), dtype)) for _ in range(2))
    w1, b1, w2, b2 = (w.astype(np.float64) for w in weights)
    hidden = reference.activate(host(x.astype(np.float64) @ w1.T + b1), "gelu_tanh")
    exact = host(cupy.asarray(hidden) @ w2.T + b2 + residual.astype(np.float64))
    torch = torch_with_gpu()
    if torch is None:
        hidden = ops.linear(x, *weights[:2], activation="gelu_tanh", backend="cublas")
        baseline = host(ops.linear(hidden, *weights[2:], residual=residual, backend="cublas"))
    else:
        tensors = [torch.as_tensor(a.astype(np.float32), device="cuda") for a in (x, *weights)]
        x_, w1_, b1_, w2_, b2_ = (t.to(getattr(torch, kind)) for t in tensors)
        linear = torch.nn.functional.linear
        hidden = torch.nn.functional.gelu(linear(x_, w1_, b1_), approximate="tanh")
        added = torch.as_tensor(residual.astype(np.float32), device="cuda").to(hidden.dtype)
        baseline = (added + linear(hidden, w2_, b2_)).float().cpu().numpy()
    ours = host(ops.ffn(x, *weights, residual=residual))
    check(ours, baseline, exact, dtype, f"ffn {rows} x {c} x {f}")


def float32_on_gpu(function, *arrays):
    """What PyTorch computes in float32 on this GPU, else one running sum in NumPy.

    ``function`` takes PyTorch's module of functions, or one of NumPy, and the arrays.
    """
    if (torch := torch_with_gpu()) is not None:
        torch.backends.cuda.matmul.allow_tf32 = False
        given_ = [torch.as_tensor(a, device="cuda") if np.ndim(a) else a for a in arrays]
        return function(torch.nn.functional, *given_).cpu().numpy()
    token = reference_product.PART.set(1 << 30)
    try:
        plain = SimpleNamespace(
            linear=reference.linear, gelu=lambda x, approximate: reference.gelu(x, approximate)
        )
        return function(plain, *arrays)
    finally:
        reference_product.PART.reset(token)


def linear_gelu(F, x, w, bias, residual):
    y = F.gelu(F.linear(x, w, bias), approximate="tanh")
    return y if residual is None else y + residual


def ffn_gelu(F, x, w1, b1, w2, b2, residual):
    return F.linear(F.gelu(F.linear(x, w1, b1), approximate="tanh"), w2, b2) + residual


@pytest.mark.gpu
@pytest.mark.parametrize("wgmma", [True, False])
@pytest.mark.parametrize("rows", [1, 19, 128, 300])
@pytest.mark.parametrize(("m", "k"), [(19, 988), (59, 516), (257, 544), (768, 3072)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_split_products(wgmma, rows, m, k, with_residual):
    import cupy

    if wgmma and device_arch(current_device()) != "sm_90":
        pytest.skip("wgmma is of sm_90")
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, w, bias = draw(rng, (rows, k)), draw(rng, (m, k), F32, k**-0.5), draw(rng, m)
        residual = draw(rng, (rows, m)) if with_residual else None
        arrays = on(cupy, x, w, bias, residual)
        out = cupy.full((rows, m), np.nan, np.float32)
        linear_split.launch_split(arrays[1], rows, (*arrays, out, 1), wgmma)
        options = {"activation": "gelu_tanh", "residual": wide(residual)[0]}
        exact = reference.linear(*wide(x, w, bias), **options)
        baseline = float32_on_gpu(linear_gelu, x, w, bias, residual)
        found.append((host(out), baseline, exact))
    check_together(found, F32, f"split {rows} {m} {k}")


@pytest.mark.gpu
@pytest.mark.parametrize("wgmma", [True, False])
def test_split_products_of_large_and_small_numbers(wgmma):
    """Outliers of thousands beside numbers of a thousandth, as trained models have them."""
    import cupy

    if wgmma and device_arch(current_device()) != "sm_90":
        pytest.skip("wgmma is of sm_90")
    rng = np.random.default_rng(0)
    x, w = draw(rng, (130, 4096)), draw(rng, (256, 4096), F32, 0.02)
    x[:, ::97] *= np.float32(3000)
    x[:, 1::2] *= np.float32(1e-3)
    out = cupy.empty((130, 256), np.float32)
    arrays = on(cupy, x, w)
    linear_split.launch_split(arrays[1], 130, (*arrays, None, None, out, 0), wgmma)
    baseline = float32_on_gpu(lambda F, x, w: F.linear(x, w), x, w)
    check(host(out), baseline, reference.linear(*wide(x, w)), F32, "split with outliers")


@pytest.mark.parametrize("lead", [(), (2, 3), (4, 1, 1), (1, 0), (0,)])
def test_linear_takes_any_leading_dimensions(xp, dtype, lead):
    rng = np.random.default_rng(0)
    x, w, bias = draw(rng, (*lead, 24), dtype), draw(rng, (40, 24), dtype), draw(rng, 40, dtype)
    residual = draw(rng, (*lead, 40), dtype)
    ours = ops.linear(*on(xp, x, w, bias), residual=xp.asarray(residual), activation="relu")
    flat = reference.linear(
        x.reshape(math.prod(lead), 24),
        w,
        bias,
        activation="relu",
        residual=residual.reshape(math.prod(lead), 40),
    )
    assert ours.shape == (*lead, 40) and ours.dtype == dtype
    np.testing.assert_allclose(
        host(ours).astype(np.float32).ravel(), flat.astype(np.float32).ravel(), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_a_sum_of_nothing_is_the_bias(xp, rows):
    bias, residual = np.arange(5, dtype=np.float32), np.ones((rows, 5), np.float32)
    x, w, b, r = on(
        xp, np.zeros((rows, 0), np.float32), np.zeros((5, 0), np.float32), bias, residual
    )
    np.testing.assert_array_equal(host(ops.linear(x, w, b, residual=r)), residual + bias)
    assert ops.linear(x, w[:0]).shape == (rows, 0)


BAD = {
    "an unknown activation": (lambda x, w, b: ops.linear(x, w, b, activation="gelu"), "activation"),
    "an unknown backend": (lambda x, w, b: ops.linear(x, w, b, backend="fast"), "backend"),
    "a weight of another width": (lambda x, w, b: ops.linear(x, w[:, :4].copy(), b), "weight"),
    "a weight of three dimensions": (lambda x, w, b: ops.linear(x, w[None], b), "weight"),
    "a number": (lambda x, w, b: ops.linear(x.sum(), w, b), "x is"),
    "a bias of another width": (lambda x, w, b: ops.linear(x, w, b[:3].copy()), "bias"),
    "a residual of another shape": (lambda x, w, b: ops.linear(x, w, residual=x), "residual"),
    "an out of another shape": (lambda x, w, b: ops.linear(x, w, out=x), "out"),
    "an unknown activation of ffn": (
        lambda x, w, b: ops.ffn(x, w, b, w.T, None, activation="x"),
        "act",
    ),
    "a second matrix that does not fit": (lambda x, w, b: ops.ffn(x, w, b, w, None), "w2"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("lead", [(1,), (4,), (2, 100)])
def test_what_does_not_fit_is_refused_by_name(xp, case, lead):
    call, says = BAD[case]
    x, w, b = xp.ones((*lead, 8), np.float32), xp.ones((5, 8), np.float32), xp.ones(5, np.float32)
    with pytest.raises(InputError, match=says) as caught:
        call(x, w, b)
    assert caught.value.remedy and caught.value.where


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 40, 300])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_what_only_a_gpu_refuses(rows, kind):
    import cupy

    x, w = cupy.ones((rows, 64), kind), cupy.ones((64, 64), kind)
    with pytest.raises(InputError, match="out shares memory with x"):
        ops.linear(x, w, out=x)
    if rows > 1:
        with pytest.raises(InputError, match="out"):
            ops.linear(x, w, out=cupy.ones((64, rows), kind).T)
    with pytest.raises(InputError, match="weight"):
        ops.linear(x, cupy.ones((64, 64), kind).T)
    with pytest.raises(InputError, match="float64"):
        ops.linear(x, w.astype("float64"))
    with pytest.raises(InputError, match="x"):
        ops.linear(cupy.ones((2, 64, rows + 1), kind).transpose(0, 2, 1), w)
    with pytest.raises(InputError, match="weight"):
        ops.linear(x, w.get())


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), max_size=3),
    *(st.integers(0, 40) for _ in range(3)),
    st.sampled_from(["gelu_tanh", "gelu_erf", "relu", "silu", "tanh"]),
    st.integers(0, 15),
)
def test_ffn_of_anything_is_two_products(lead, c, f, m, activation, bits):
    (x, w1, b1, w2, b2), residual = ffn_arrays(np.random.default_rng(0), lead, c, f, m, F32)
    b1, b2 = (b1 if bits & 1 else None), (b2 if bits & 2 else None)
    residual = residual if bits & 4 else None
    ours = ops.ffn(x, w1, b1, w2, b2, activation=activation, residual=residual)
    hidden = reference.activate(
        x.astype(np.float64) @ w1.T.astype(np.float64) + (0 if b1 is None else b1), activation
    )
    exact = hidden @ w2.T + (0 if b2 is None else b2) + (0 if residual is None else residual)
    assert ours.shape == (*lead, m) and ours.dtype == F32
    np.testing.assert_allclose(ours, exact, rtol=1e-4, atol=1e-4)
