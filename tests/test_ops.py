"""Every op against its float64 reference, on NumPy and on the GPU, by the error rule."""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest
from builders import host
from error_rule import DTYPES, check

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import attention, device, product, reference

SEEDS = range(5)
AWKWARD = [1, 19, 99, 128, 768, 989, 1028, 1600, 2052]


def draw(rng, shape, dtype, scale=1.0):
    """Random values already rounded to the dtype, so that rounding inputs is no error."""
    return (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).astype(dtype)


def wide(*arrays):
    return [None if a is None else a.astype(np.float64) for a in arrays]


def together(found):
    """(ours, baseline, exact) of several seeds as one: a single value can be right by luck."""
    return [np.concatenate([np.ravel(a) for a in column]) for column in zip(*found, strict=True)]


def on(xp, *arrays):
    return [None if a is None else xp.asarray(a) for a in arrays]


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return DTYPES[request.param]


@pytest.mark.parametrize("name", reference.__all__)
def test_reference_has_the_signature_of_the_op(name):
    ours = inspect.signature(getattr(ops, name)).parameters
    theirs = inspect.signature(getattr(reference, name)).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]


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
    check(*together(found), dtype, "layer_norm")


@pytest.mark.parametrize("channels", [19, 768, 1600, 2052])
def test_add_layer_norm_updates_the_residual(xp, dtype, channels):
    rng = np.random.default_rng(0)
    x, r = draw(rng, (3, channels), dtype), draw(rng, (3, channels), np.float32)
    w, b = draw(rng, channels, dtype), draw(rng, channels, dtype)
    exact = reference.add_layer_norm(*wide(x, r, w, b))
    baseline = reference.add_layer_norm(x, r.copy(), w, b)
    residual = xp.array(r)
    ours = ops.add_layer_norm(xp.asarray(x), residual, xp.asarray(w), xp.asarray(b))
    check(host(ours), baseline, exact, dtype, "add_layer_norm")
    np.testing.assert_array_equal(host(residual), r + x.astype(np.float32))


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
    check(*together(found), dtype, f"linear {backend}")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [17, 63, 64, 65, 128])
@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize(("m", "k"), [(1, 8), (67, 200), (130, 1000), (768, 3072)])
@pytest.mark.parametrize("wide_out", [False, True])
def test_a_product_of_tens_of_rows_by_clusters(dtype, rows, split, m, k, wide_out, monkeypatch):
    import cupy

    if dtype == np.float32 or not device.has_clusters():
        pytest.skip("the library's product is taken")
    monkeypatch.setattr(product, "_MOST_ROWS", 128)
    monkeypatch.setattr(product, "_rows_split", lambda *sizes: split)
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
    check(*together(found), dtype, f"linear_rows {split}")


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
    check(*together(found), np.dtype(np.float32), "shifted_bias")


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
    check(*together(found), dtype, "norm_linear")


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


def cache_pair(rng, dtype, slots, heads, capacity, head_size, lengths):
    """A cache whose filled part is random and whose rest is NaN: an over-read shows."""
    shape = (slots, heads, capacity, head_size)
    k, v = draw(rng, shape, dtype), draw(rng, shape, dtype)
    for slot in range(slots):
        k[slot, :, lengths.get(slot, 0) :] = np.nan
        v[slot, :, lengths.get(slot, 0) :] = np.nan
    return k, v


def attention_baseline(xp, qkv, k, v, starts, slots, past, scale):
    """PyTorch's attention on the GPU under test where it is installed; else ours on NumPy."""
    if xp is np or not (torch := torch_with_gpu()):
        counts = np.diff(starts)
        rows = [np.asarray(a, np.int32) for a in (starts, slots, past)]
        return reference.attention_prefill(qkv, k.copy(), v.copy(), *rows, max(counts), scale)
    heads, head_size = k.shape[1], k.shape[3]
    found = []
    for row, slot in enumerate(slots):
        new = qkv[starts[row] : starts[row + 1]].reshape(-1, 3, heads, head_size)
        q, new_k, new_v = new.transpose(1, 2, 0, 3)
        first, count = int(past[row]), len(new)
        keys = np.concatenate([k[slot, :, :first], new_k], axis=1)
        values = np.concatenate([v[slot, :, :first], new_v], axis=1)
        visible = np.arange(first + count) <= np.arange(first, first + count)[:, None]
        kind = getattr(torch, qkv.dtype.name)
        q, keys, values = (
            torch.tensor(a.astype(np.float32), device="cuda").to(kind) for a in (q, keys, values)
        )
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], keys[None], values[None], torch.tensor(visible, device="cuda"), scale=scale
        )
        found.append(out[0].transpose(0, 1).reshape(count, -1).float().cpu().numpy())
    return np.concatenate(found)


def torch_with_gpu():
    """PyTorch if it is installed with CUDA, else None.

    None too where GPT2CUPY_TEST_TORCH=0: a sanitizer would look at its kernels as at ours.
    """
    if os.environ.get("GPT2CUPY_TEST_TORCH") == "0":
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


HEAD_SIZES = [1, 8, 32, 59, 64, 80, 96, 128]


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("position", [0, 1, 31, 32, 255, 300, 1023])
def test_attention_decode(xp, dtype, head_size, position):
    attention_decode_case(xp, dtype, head_size, position)


@pytest.mark.gpu
@pytest.mark.parametrize("split", [1, 2, 4])
@pytest.mark.parametrize("position", [0, 32, 300])
def test_attention_decode_by_fewer_blocks(dtype, split, position, monkeypatch):
    import cupy

    if not device.has_clusters():
        pytest.skip("one block is all there is on this chip")
    monkeypatch.setattr(attention, "_split", lambda heads: split)
    attention_decode_case(cupy, dtype, 64, position)


@pytest.mark.gpu
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("position", [0, 15, 16, 63, 64, 300])
def test_attention_decode_of_many_rows(dtype, head_size, position, monkeypatch):
    import cupy

    monkeypatch.setattr(attention, "_MANY_PER_SM", 0)
    attention_decode_case(cupy, dtype, head_size, position)


def attention_decode_case(xp, dtype, head_size, position):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        heads = 3
        qkv = draw(rng, (2, 3 * heads * head_size), dtype)
        k, v = cache_pair(rng, dtype, 3, heads, 1024, head_size, {2: position, 0: 5})
        slots, positions = np.array([2, 0], np.int32), np.array([position, 5], np.int32)
        args = (slots, positions, head_size**-0.5)
        exact = reference.attention_decode(*wide(qkv, k, v), *args)
        baseline = attention_baseline(xp, qkv, k, v, [0, 1, 2], slots, positions, args[2])
        kx, vx = on(xp, k, v)
        ours = ops.attention_decode(xp.asarray(qkv), kx, vx, *on(xp, slots, positions), args[2])
        found.append((host(ours), baseline, exact))
        new = qkv.reshape(2, 3, heads, head_size)
        np.testing.assert_array_equal(host(kx)[2, :, position], new[0, 1])
        np.testing.assert_array_equal(host(vx)[0, :, 5], new[1, 2])
    check(*together(found), dtype, f"decode {head_size}")


def test_attention_decode_leaves_idle_and_full_rows_alone(xp, dtype):
    rng = np.random.default_rng(0)
    qkv = draw(rng, (2, 3 * 64), dtype)
    k = draw(rng, (1, 1, 4, 64), dtype)
    kx, vx = on(xp, k, k)
    rows = on(xp, np.array([-1, 0], np.int32), np.array([0, 4], np.int32))
    out = ops.attention_decode(xp.asarray(qkv), kx, vx, *rows, 0.125)
    assert not host(out).any()
    np.testing.assert_array_equal(host(kx), k)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("lengths", [(1,), (5, 70), (64, 33, 1), (200,)])
@pytest.mark.parametrize("past", [0, 37, 300])
def test_attention_prefill(xp, dtype, head_size, lengths, past):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        found.append(prefill_case(xp, rng, dtype, head_size, lengths, past))
    check(*together(found), dtype, f"prefill {head_size}")


def prefill_case(xp, rng, dtype, head_size, lengths, past):
    """One packed prompt: (ours, baseline, exact), with the cache it leaves compared."""
    heads, total = 2, sum(lengths)
    qkv = draw(rng, (total, 3 * heads * head_size), dtype)
    slots = np.arange(len(lengths), dtype=np.int32)[::-1].copy()
    before = {int(slot): past for slot in slots}
    k, v = cache_pair(rng, dtype, len(lengths), heads, 520, head_size, before)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = (starts, slots, np.full(len(lengths), past, np.int32))
    rest = (max(lengths), head_size**-0.5)
    exact = reference.attention_prefill(*wide(qkv, k, v), *rows, *rest)
    baseline = attention_baseline(xp, qkv, k, v, *rows, rest[1])
    kx, vx = on(xp, k, v)
    ours = ops.attention_prefill(xp.asarray(qkv), kx, vx, *on(xp, *rows), *rest)
    new = qkv.reshape(total, 3, heads, head_size)
    last = slots[-1]
    begin = starts[-2]
    np.testing.assert_array_equal(
        host(kx)[last, :, past : past + lengths[-1]], new[begin:, 1].transpose(1, 0, 2)
    )
    return host(ours), baseline, exact


def test_embedding(xp, dtype):
    rng = np.random.default_rng(0)
    wte, wpe = draw(rng, (99, 19), dtype), draw(rng, (10, 19), dtype)
    ids, positions = np.array([0, 98, 7], np.int32), np.array([9, 0, 3], np.int32)
    ours = ops.embedding(*on(xp, ids, positions, wte, wpe))
    expected = wte[ids].astype(np.float32) + wpe[positions].astype(np.float32)
    np.testing.assert_array_equal(host(ours), expected)


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
    with pytest.raises(InputError, match=r"C=64"):
        ops.layer_norm(x, w[:32], w)
    with pytest.raises(InputError, match="fit each other"):
        ops.linear(x, cp.ones((8, 32), np.float32))
    with pytest.raises(InputError, match="aligned"):
        ops.layer_norm(cp.ones(4 * 64 + 1, np.float32)[1:].reshape(4, 64), w, w)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype_name", DTYPES)
def test_the_ladders_agree_with_their_last_step(dtype_name):
    import cupy as cp

    from gpt2cupy.ops.attention import ATTENTION_NAIVE
    from gpt2cupy.ops.launch import launch
    from gpt2cupy.ops.norm import LAYER_NORM_NAIVE
    from gpt2cupy.ops.product import GEMV, GEMV_NAIVE, GEMV_SCALAR

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
