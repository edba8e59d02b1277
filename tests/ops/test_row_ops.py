"""Norms, activations, rotary embedding, softmax and lookup: NumPy and GPU against float64."""

from __future__ import annotations

import numpy as np
import pytest
from builders import host
from error_rule import DTYPES, check
from op_checks import SEEDS, check_together, draw, on, wide

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import norm, reference

# In registers of a warp, of a block; wide; in passes; odd, and odd in passes.
WIDTHS = [1, 19, 111, 768, 989, 1600, 4096, 8192, 16384, 16388, 20000, 40960]
FEW = [111, 768, 1600, 40960]


def norm_inputs(rng, shape, dtype, of_x, outlier=0.0):
    x = draw(rng, shape, of_x)
    x[..., shape[-1] // 2] += np.asarray(outlier, x.dtype)
    return x, draw(rng, shape[-1], dtype), draw(rng, shape[-1], dtype)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("wide_x", [False, True])
def test_norms(xp, dtype, channels, name, wide_x):
    found, many = [], 0 if name == "rms_norm" else 1
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        of_x = DTYPES["float32"] if wide_x else dtype
        x, *params = norm_inputs(rng, (3, channels), dtype, of_x, 300.0 * (seed % 2))
        params = params[: 1 + many]
        ours = getattr(ops, name)(*on(xp, x, *params))
        assert ours.dtype == dtype and ours.shape == x.shape
        oracle = getattr(reference, name)
        found.append((host(ours), oracle(x, *params), oracle(*wide(x, *params))))
    check_together(found, dtype, f"{name} {channels}")


@pytest.mark.parametrize("channels", FEW)
@pytest.mark.parametrize("name", ["add_layer_norm", "add_rms_norm"])
@pytest.mark.parametrize("wide_sum", [False, True])
def test_norms_of_a_sum(xp, dtype, channels, name, wide_sum):
    rng = np.random.default_rng(0)
    of_sum = DTYPES["float32"] if wide_sum else dtype
    x, *params = norm_inputs(rng, (2, 3, channels), dtype, dtype)
    params = params[: 1 if name == "add_rms_norm" else 2]
    residual = draw(rng, x.shape, of_sum)
    oracle = getattr(reference, name)
    exact = oracle(*wide(x, residual, *params))[0]
    baseline, total = oracle(x, residual, *params)
    args = on(xp, x, residual, *params)
    ours, summed = getattr(ops, name)(*args)
    assert ours.dtype == dtype and summed.dtype == of_sum
    check(host(ours), baseline, exact, dtype, name)
    np.testing.assert_array_equal(host(summed), total)
    # In place, and into what is given.
    into = xp.empty(x.shape, dtype)
    again = getattr(ops, name)(*args, out=(into, args[1]))
    assert again[0] is into and again[1] is args[1]
    np.testing.assert_array_equal(host(into), host(ours))
    np.testing.assert_array_equal(host(args[1]), total)


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_norms_without_parameters_and_in_place(xp, dtype, name):
    rng = np.random.default_rng(0)
    x = draw(rng, (2, 4, 768), dtype)
    nothing = (None,) * (1 if name == "rms_norm" else 2)
    exact = getattr(reference, name)(*wide(x), *nothing)
    given = xp.array(x)
    ours = getattr(ops, name)(given, *nothing, out=given)
    assert ours is given
    check(host(ours), getattr(reference, name)(x, *nothing), exact, dtype, name)


@pytest.mark.parametrize("channels", [99, 128, 512, 4096, 9000])
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_rms_norm", "softmax", "gelu"])
def test_rows_of_an_odd_stride_in_place(xp, dtype, channels, name):
    """They begin anywhere, so that pieces of 16 bytes would not fit."""
    rng = np.random.default_rng(0)
    wide_x = draw(rng, (9, channels + 1), dtype)
    x, w = wide_x[:, :channels], draw(rng, channels, dtype)
    params = {"layer_norm": (w, w), "rms_norm": (w,), "add_rms_norm": (w,)}.get(name, ())
    given, args = xp.array(wide_x), on(xp, *params)
    rows = given[:, :channels]
    if name == "add_rms_norm":
        residual = xp.array(given)[:, :channels]
        exact = reference.rms_norm(2 * wide(x)[0], *wide(*params))
        baseline = reference.add_rms_norm(x, x, *params)[0]
        ours, total = ops.add_rms_norm(rows, residual, *args, out=(rows, residual))
        np.testing.assert_array_equal(host(total), (x + x).astype(dtype))
    else:
        exact = getattr(reference, name)(*wide(x, *params))
        baseline = getattr(reference, name)(x, *params)
        ours = getattr(ops, name)(rows, *args, out=rows)
    check(host(ours), baseline, exact, dtype, name)
    np.testing.assert_array_equal(host(given)[:, channels], wide_x[:, channels])


@pytest.mark.parametrize("rows", [1, 4, 19, 99, 2500])
@pytest.mark.parametrize("channels", [111, 768, 4096])
def test_a_row_does_not_feel_the_others(xp, dtype, rows, channels):
    rng = np.random.default_rng(0)
    x, w, b = norm_inputs(rng, (rows, channels), dtype, dtype)
    last = x[-1:]
    x, w, b = on(xp, x, w, b)
    for op, params in ((ops.layer_norm, (w, b)), (ops.rms_norm, (w,)), (ops.softmax, ())):
        alone, beside = host(op(x[-1:], *params)), host(op(x, *params))[-1:]
        if op is ops.softmax and channels * dtype.itemsize % 16:
            # Vectors are taken from where a row is aligned on, so the order of its sums depends
            # on its address: no bits are promised, and both keep the error rule.
            exact = reference.softmax(*wide(last))
            for found in (alone, beside):
                check(found, reference.softmax(last), exact, dtype, "softmax")
        else:
            np.testing.assert_array_equal(beside, alone)


@pytest.mark.parametrize("channels", [19, 111, 768, 1600, 9000])
@pytest.mark.parametrize("rows", [1, 5, 99])
@pytest.mark.parametrize("name", ["layer_norm_backward", "rms_norm_backward"])
def test_gradients_of_norms(xp, dtype, channels, rows, name):
    rng = np.random.default_rng(0)
    x, w, _ = norm_inputs(rng, (rows, channels), dtype, dtype)
    dy = draw(rng, x.shape, dtype)
    oracle = getattr(reference, name)
    exact, baseline = oracle(*wide(dy, x, w)), oracle(dy, x, w)
    ours = getattr(ops, name)(*on(xp, dy, x, w))
    assert len(ours) == len(exact) == (3 if "layer" in name else 2)
    for mine, theirs, true, what in zip(ours, baseline, exact, "xwb", strict=False):
        assert mine.dtype == dtype
        check(host(mine), theirs, true, dtype, f"{name} d{what}")


def test_gradients_are_those_of_differences():
    rng = np.random.default_rng(0)
    x, w, b, dy = (rng.standard_normal(s) for s in ((4, 6), 6, 6, (4, 6)))
    for name, params in (("layer_norm", (w, b)), ("rms_norm", (w,))):
        forward = getattr(reference, name)
        found = getattr(reference, f"{name}_backward")(dy, x, w)
        for place, (array, gradient) in enumerate(zip((x, *params), found, strict=True)):
            step = np.zeros_like(array)
            step.flat[3] = 1e-6
            args = [x, *params]
            args[place] = array + step
            up = forward(*args)
            args[place] = array - step
            slope = ((up - forward(*args)) * dy).sum() / 2e-6
            assert slope == pytest.approx(gradient.flat[3], rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("channels", [1, 19, 768, 3072])
def test_gelu(xp, dtype, approximate, channels):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        x, b = draw(rng, (2, 5, channels), dtype, 3.0), draw(rng, channels, dtype)
        x.flat[:4] = [-30, 30, 0, -0.0]
        exact = reference.bias_gelu(*wide(x, b), approximate)
        ours = ops.bias_gelu(*on(xp, x, b), approximate)
        found.append((host(ours), reference.bias_gelu(x, b, approximate), exact))
    check_together(found, dtype, f"bias_gelu {approximate}")
    exact = reference.gelu(*wide(x), approximate)
    given = xp.array(x)
    ours = ops.gelu(given, approximate, out=given)
    assert ours is given
    check(host(ours), reference.gelu(x, approximate), exact, dtype, f"gelu {approximate}")


@pytest.mark.parametrize("channels", [1, 99, 768, 11008])
def test_silu_mul_of_the_sides_of_one_array(xp, dtype, channels):
    rng = np.random.default_rng(0)
    both = draw(rng, (2, 3, 2 * channels), dtype, 4.0)
    both.flat[:2] = [-90, 90]
    gate, up = both[..., :channels], both[..., channels:]
    exact, baseline = reference.silu_mul(*wide(gate, up)), reference.silu_mul(gate, up)
    given = xp.asarray(both)
    ours = ops.silu_mul(given[..., :channels], given[..., channels:])
    check(host(ours), baseline, exact, dtype, "silu_mul")
    # In place on a view: what lies between its rows stays.
    ops.silu_mul(given[..., :channels], given[..., channels:], out=given[..., :channels])
    np.testing.assert_array_equal(host(given)[..., :channels], host(ours))
    np.testing.assert_array_equal(host(given)[..., channels:], up)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("size", "rotary"), [(64, 64), (128, 128), (64, 32), (59, 20), (6, 6)])
def test_rope(xp, dtype, interleaved, size, rotary):
    rng = np.random.default_rng(0)
    qkv = draw(rng, (2, 5, 3, 4, size), dtype)
    q = qkv[:, :, 1]  # tokens lie one stride apart
    tables = reference_tables = ops.rope_tables(40000, rotary)
    positions = np.array([[0, 1, 39999, 7, 3], [4, 40000, -1, 5, 5]], np.int32)
    options = {"interleaved": interleaved}
    exact = reference.rope(*wide(q), *wide(*tables), positions, **options)
    baseline = reference.rope(q, *reference_tables, positions, **options)
    given = xp.asarray(qkv)
    args = on(xp, *tables, positions)
    ours = ops.rope(given[:, :, 1], *args, **options)
    check(host(ours), baseline, exact, dtype, "rope")
    assert not host(ours)[1, 1:3].any()  # outside the tables
    ops.rope(given[:, :, 1], *args, **options, out=given[:, :, 1])
    np.testing.assert_array_equal(host(given)[:, :, 1], host(ours))
    np.testing.assert_array_equal(host(given)[:, :, 2], qkv[:, :, 2])
    by_number = ops.rope(given[0, :, 0], *args[:2], **options)
    numbers = xp.arange(5, dtype=np.int32)
    np.testing.assert_array_equal(
        host(by_number), host(ops.rope(given[0, :, 0], *args[:2], numbers, **options))
    )


def test_rope_tables_are_those_of_the_paper():
    cosines, sines = ops.rope_tables(3, 4, 100.0)
    np.testing.assert_allclose(cosines[2], np.cos([2.0, 0.2]), rtol=1e-6)
    np.testing.assert_allclose(sines[2], np.sin([2.0, 0.2]), rtol=1e-6)
    slower = ops.rope_tables(3, 4, 100.0, np.array([1.0, 0.5]))
    np.testing.assert_allclose(slower[1][2], np.sin([2.0, 0.1]), rtol=1e-6)
    with pytest.raises(InputError, match="rotary_size=3 is impossible"):
        ops.rope_tables(3, 3)


@pytest.mark.parametrize("channels", [1, 19, 128, 989, 4096, 50257, 50304, 300000])
@pytest.mark.parametrize("rows", [1, 3])
def test_softmax(xp, dtype, channels, rows):
    found = []
    for seed in SEEDS[: 2 if channels > 9000 else 5]:
        rng = np.random.default_rng(seed)
        x = draw(rng, (rows, channels), dtype, 4.0)
        x[0, channels // 2 :: 3] = -np.inf
        x[0, 0] = 9
        ours = ops.softmax(*on(xp, x))
        found.append((host(ours), reference.softmax(x), reference.softmax(*wide(x))))
    check_together(found, dtype, f"softmax {channels}")


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [8192, 16389, 50257])
@pytest.mark.parametrize("rows", [17, 40, 70, 140])
def test_softmax_of_rows_that_fewer_blocks_share(dtype, rows, channels):
    cupy = pytest.importorskip("cupy")
    x = draw(np.random.default_rng(rows), (rows, channels), dtype, 4.0)
    ours = ops.softmax(cupy.asarray(x))
    check(host(ours), reference.softmax(x), reference.softmax(*wide(x)), dtype, "softmax")


@pytest.mark.parametrize("channels", [5, 989, 50257])
def test_softmax_of_what_is_no_number(xp, channels):
    x = np.zeros((4, channels), np.float32)
    x[0] = -np.inf
    x[1, 3], x[2, 3] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        y = host(ops.softmax(xp.asarray(x)))
    assert np.isnan(y[:2]).all() and np.isnan(y[2, 3]) and not np.isnan(y[3]).any()


@pytest.mark.parametrize("channels", [1, 19, 768])
@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_lookup(xp, dtype, channels, kind):
    table = draw(np.random.default_rng(0), (7, channels), dtype)
    ids = np.array([[0, 6, 3], [7, -1, 2]], kind)
    ours = host(ops.lookup(*on(xp, ids, table)))
    assert ours.dtype == dtype
    np.testing.assert_array_equal(ours[0], table[[0, 6, 3]])
    np.testing.assert_array_equal(ours[1, 2], table[2])
    assert not ours[1, :2].any()  # outside the table


@pytest.mark.parametrize("vocabulary", [19, 989, 50257])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0},
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.9, "temperature": 1.3},
        {"top_k": 40, "top_p": 0.8, "min_p": 0.02},
    ],
)
def test_sample_logits(xp, dtype, vocabulary, settings):
    logits = draw(np.random.default_rng(0), (5, vocabulary), dtype, 3.0)
    positions = np.array([3, 4, 1000, 3, 9], np.int32)
    logits[3] = logits[0]
    given, at = on(xp, logits, positions)
    ours = host(ops.sample_logits(given, at, **settings, seed=2**63 + 5))
    np.testing.assert_array_equal(
        ours, reference.sample_logits(logits, positions, **settings, seed=2**63 + 5)
    )
    assert ours[3] == ours[0], "the same seed and position"
    by_number = host(ops.sample_logits(given, **settings))
    numbers = xp.arange(5, dtype=np.int32)
    np.testing.assert_array_equal(by_number, host(ops.sample_logits(given, numbers, **settings)))


@pytest.mark.parametrize("vocabulary", [700, 50257])
@pytest.mark.parametrize("top_k", [1, 7, 50, 1024, 2000])
@pytest.mark.parametrize("kind", ["few values", "one value", "masked", "zeros", "nan"])
def test_sample_logits_of_equal_and_missing_logits(xp, kind, top_k, vocabulary):
    """More tokens than are collected reach the bound, or none is sure to."""
    rng = np.random.default_rng(top_k)
    logits = {
        "few values": rng.integers(-3, 3, (3, vocabulary)).astype(np.float32),
        "one value": np.full((3, vocabulary), 0.25, np.float32),
        "masked": np.where(rng.random((3, vocabulary)) < 0.999, -np.inf, 1.5),
        "zeros": np.where(rng.random((3, vocabulary)) < 0.999, -1.0, -0.0),
        "nan": np.where(rng.random((3, vocabulary)) < 0.999, 0.5, np.nan),
    }[kind].astype(np.float32)
    logits[:, 5:9] = [0.0, 2.0, 1.75, -0.0]
    settings = {"temperature": 0.7, "top_k": top_k, "top_p": 0.95}
    if kind == "nan":  # the reference has no order for it; any token of the row
        ours = host(ops.sample_logits(xp.asarray(logits), **settings))
        assert ((ours >= 0) & (ours < vocabulary)).all()
        return
    np.testing.assert_array_equal(
        host(ops.sample_logits(xp.asarray(logits), **settings, seed=3)),
        reference.sample_logits(logits, **settings, seed=3),
    )


def test_samples_are_as_frequent_as_they_are_probable():
    logits = np.log(np.tile([0.5, 0.3, 0.15, 0.05], (1000, 1))).astype(np.float32)
    counts = np.bincount(ops.sample_logits(logits, seed=1), minlength=4) / 1000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.06)
    kept = ops.sample_logits(logits, top_p=0.7, seed=1)
    assert set(kept) == {0, 1}


@pytest.mark.parametrize(
    "changed",
    [{"temperature": -1}, {"top_p": 0}, {"top_k": -1}, {"min_p": 2}, {"seed": -1}],
)
def test_sample_logits_refuses(xp, changed):
    with pytest.raises(InputError, match=f"{next(iter(changed))} is outside its range"):
        ops.sample_logits(xp.zeros((2, 5), np.float32), **changed)


def test_nothing_in_nothing_out(xp, dtype):
    w, ids = xp.ones(8, dtype), xp.zeros((0, 3), np.int32)
    for shape in ((0, 8), (2, 0, 8)):
        x = xp.zeros(shape, dtype)
        for y in (
            ops.layer_norm(x, w, w),
            ops.rms_norm(x, w),
            *ops.add_rms_norm(x, x, w),
            *ops.add_layer_norm(x, x, w, w),
            ops.gelu(x),
            ops.bias_gelu(x, w),
            ops.silu_mul(x, x),
            ops.softmax(x),
        ):
            assert y.shape == shape and y.dtype == dtype
        dx, dweight, dbias = ops.layer_norm_backward(x, x, w)
        assert dx.shape == shape and not host(dweight).any() and not host(dbias).any()
    assert ops.softmax(xp.zeros((3, 0), dtype)).shape == (3, 0)
    assert ops.lookup(ids, xp.zeros((4, 8), dtype)).shape == (0, 3, 8)
    assert ops.sample_logits(xp.zeros((0, 5), dtype)).shape == (0,)
    tables = on(xp, *ops.rope_tables(4, 8))
    assert ops.rope(xp.zeros((0, 2, 8), dtype), *tables).shape == (0, 2, 8)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda x, w: ops.rms_norm(x, w[:3]), "weight"),
        (lambda x, w: ops.layer_norm(x, w, w[:1]), "bias"),
        (lambda x, w: ops.rms_norm(x, w, out=x[:1].copy()), "out"),
        (lambda x, w: ops.add_rms_norm(x, x[:1], w), "residual"),
        (lambda x, w: ops.bias_gelu(x, w[:1]), "bias"),
        (lambda x, w: ops.silu_mul(x, x[:1]), "up"),
        (lambda x, w: ops.gelu(x, "sigmoid"), "approximate='sigmoid' is impossible"),
        (lambda x, w: ops.rms_norm_backward(x[:1], x, w), "dy is|x is"),
        (lambda x, w: ops.softmax(x[0, 0]), "x is"),
        (lambda x, w: ops.rope(x, x, x), "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(xp, call, says):
    x, w = xp.ones((4, 8), np.float32), xp.ones(8, np.float32)
    with pytest.raises(InputError, match=says) as caught:
        call(x, w)
    assert caught.value.remedy and caught.value.where


@pytest.mark.parametrize("sizes", [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("in_pieces", [True, False])
def test_warps_of_a_row_hold_it_or_follow_from_it_alone(sizes, centred, in_pieces):
    c, counts = norm.constants("norm.cu"), (1, 7, 512, 513, 5000)
    for channels in (*WIDTHS, 32768, 40960, 70000):
        blocks = [norm._blocks((n, channels), *sizes, centred, in_pieces) for n in counts]
        elements, held = 1, c["MOST_SINGLE"]
        if in_pieces and not channels * sizes[0] % 16:
            elements, held = 16 // sizes[0], c["MOST_IN_PIECES"] // (16 // sizes[0])
        for rows, (grid, block) in zip(counts, blocks, strict=True):
            assert block == (32, 4) or (block[1] == 1 and block[0] in (64, 128, 256, 512))
            assert grid[0] * block[1] >= rows > (grid[0] - 1) * block[1]
        fits = {block[0] * held * elements >= channels for _, block in blocks}
        assert fits == {True} or len({block for _, block in blocks}) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm"])
def test_a_norm_waits_for_what_precedes_it(name):
    """Its launch may begin before: input and weights are written by kernels just before it."""
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    x, w = on(cupy, draw(rng, (2000, 4096)), draw(rng, 4096))
    args = {"layer_norm": "xww", "rms_norm": "xw", "add_layer_norm": "xxww", "add_rms_norm": "xxw"}
    outs = [cupy.empty_like(x) for _ in range(1 + name.startswith("add_"))]
    out = tuple(outs) if len(outs) > 1 else outs[0]

    def call(x, w):
        getattr(ops, name)(*(x if kind == "x" else w for kind in args[name]), out=out)
        return outs[0] + 0

    streams = cupy.cuda.Stream.null, cupy.cuda.Stream(non_blocking=True)
    for stream in streams:
        with stream:
            found, expected = [], []
            for turn in range(8):
                scaled, weights = x * (turn + 1), w * (turn + 1)
                found.append(call(scaled, weights))
                stream.synchronize()
                expected.append(call(scaled, weights))
                stream.synchronize()
            for mine, alone in zip(found, expected, strict=True):
                np.testing.assert_array_equal(host(mine), host(alone))


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [768, 1601, 4096, 8192])
def test_a_row_is_the_same_by_any_number_of_warps(channels, monkeypatch):
    """As few or many rows have them; in registers and, of an odd stride, element by element."""
    cupy = pytest.importorskip("cupy")
    rng = np.random.default_rng(0)
    x, w = draw(rng, (3, channels), np.float32), draw(rng, channels, np.float32)
    x, w = on(cupy, x, w)
    found = {}
    for warps in (1, 2, 4, 8, 16):
        block = (32, 4) if warps == 1 else (warps * 32, 1)
        if warps * 32 * (16 if channels % 4 else 32) < channels:
            continue
        monkeypatch.setattr(norm, "_blocks", lambda *_, block=block: ((3,), block))
        found[warps] = [host(y) for y in ops.add_layer_norm(x, x, w, w)]
        found[warps] += [host(ops.rms_norm(x, w))]
    first, *others = found.values()
    assert others
    for other in others:
        for mine, theirs in zip(first, other, strict=True):
            np.testing.assert_array_equal(mine, theirs)
