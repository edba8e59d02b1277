"""attention() and decode_attention(): NumPy and every GPU kernel against float64."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
from builders import host
from error_rule import check
from hypothesis import given, settings
from hypothesis import strategies as st
from op_checks import SEEDS, check_together, draw, on, wide

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import reference_attention as reference
from gpt2cupy.ops.core import signature
from gpt2cupy.ops.core.tape import THREAD

INT = np.int32
# Their names are functions'.
module = importlib.import_module("gpt2cupy.ops.attention")
of_decode = importlib.import_module("gpt2cupy.ops.decode_attention")


def forced(monkeypatch, name):
    """Make ops take the kernels of an older chip; plans are made anew."""
    if name != "best":
        monkeypatch.setattr(module, "has_wgmma", lambda: False)
    if name == "plain":
        monkeypatch.setattr(module, "has_mma", lambda: False)
        monkeypatch.setattr(of_decode, "has_mma", lambda: False)
    forget()
    yield name
    forget()


def forget():
    """Plans of calls, and what they were made from."""
    module._plan.cache_clear()
    of_decode._blocks.cache_clear()
    THREAD.plans.clear()


KERNELS = ["best", "mma", "plain"]


@pytest.fixture(params=KERNELS)
def kernels(request, monkeypatch, xp):
    """The kernels of this GPU, and those that older ones run; of NumPy there is one."""
    if xp is np and request.param != "best":
        pytest.skip("NumPy has no kernels")
    yield from forced(monkeypatch, request.param)


@pytest.fixture(params=KERNELS)
def kernels_of_cupy(request, monkeypatch):
    yield from forced(monkeypatch, request.param)


def formula(q, k, v, causal=False, scale=None, lengths=None, q_offset=0):
    """The definition, a query at a time, in the precision of its inputs."""
    batch, queries, heads, size = q.shape
    out = np.zeros_like(q)
    for b in range(batch):
        keys = k.shape[1] if lengths is None else int(lengths[b])
        first = int(np.broadcast_to(q_offset, (batch,))[b])
        for t in range(queries):
            end = min(keys, first + t + 1) if causal else keys
            for h in range(heads if end > 0 else 0):
                g = h // (heads // k.shape[2])
                scores = k[b, :end, g] @ q[b, t, h] * (size**-0.5 if scale is None else scale)
                weights = np.exp(scores - scores.max())
                out[b, t, h] = weights @ v[b, :end, g] / weights.sum()
    return out


def inputs(rng, dtype, batch, queries, keys, heads, kv, size, spread=1.0):
    shapes = (batch, queries, heads, size), (batch, keys, kv, size), (batch, keys, kv, size)
    return [draw(rng, shape, dtype, spread) for shape in shapes]


def compare(xp, dtype, found, arrays, **options):
    """Adds a call's result, the baseline and the exact one to ``found``."""
    given = {
        name: on(xp, value)[0] if isinstance(value, np.ndarray) else value
        for name, value in options.items()
    }
    ours = ops.attention(*on(xp, *arrays), **given)
    assert ours.dtype == dtype and ours.shape == arrays[0].shape
    baseline = reference.attention(*arrays, **options)
    found.append((host(ours), baseline, reference.attention(*wide(*arrays), **options)))


# queries, keys: awkward ones, those of a tile and beside them, more keys than queries and fewer.
LENGTHS = [(1, 1), (1, 99), (19, 19), (59, 99), (64, 64), (128, 128), (129, 257), (99, 19),
           (300, 989)]  # fmt: skip


@pytest.mark.parametrize("queries, keys", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(xp, kernels, dtype, queries, keys, causal):
    found = []
    for seed in SEEDS:
        arrays = inputs(np.random.default_rng(seed), dtype, 1, queries, keys, 2, 2, 64)
        compare(xp, dtype, found, arrays, causal=causal)
    check_together(found, dtype, f"attention {queries} {keys} {causal} {kernels}")


@pytest.mark.parametrize("size", range(8, 129, 8))
def test_head_sizes(xp, kernels, dtype, size):
    found = []
    for seed in SEEDS[:2]:
        arrays = inputs(np.random.default_rng(seed), dtype, 1, 99, 150, 2, 1, size)
        compare(xp, dtype, found, arrays, causal=True, q_offset=51)
    check_together(found, dtype, f"attention {size} {kernels}")


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("heads, kv", [(1, 1), (6, 2), (8, 1)])
def test_sequences_of_other_lengths_and_places(xp, kernels, dtype, size, heads, kv):
    rng, found = np.random.default_rng(0), []
    arrays = inputs(rng, dtype, 4, 150, 300, heads, kv, size)
    lengths = np.array([300, 0, 1, 129], INT)
    compare(xp, dtype, found, arrays, lengths=lengths)
    offsets = np.array([150, 0, 0, 5], INT)
    compare(xp, dtype, found, arrays, causal=True, lengths=lengths, q_offset=offsets)
    compare(xp, dtype, found, arrays, causal=True, scale=0.3)
    check_together(found, dtype, f"attention {heads}/{kv} {kernels}")
    assert not found[0][0][1].any(), "a sequence without keys gives zeros"


def test_queries_before_all_keys_give_zeros(xp, kernels, dtype):
    arrays = inputs(np.random.default_rng(0), dtype, 1, 9, 9, 2, 2, 32)
    offsets = on(xp, np.array([-4], INT))[0]
    ours = host(ops.attention(*on(xp, *arrays), True, q_offset=offsets))
    assert not ours[0, :4].any() and ours[0, 4:].any(axis=(1, 2)).all()


def test_large_scores(xp, kernels, dtype):
    """One key takes nearly all the weight, as in trained models."""
    found = []
    for seed in SEEDS:
        arrays = inputs(np.random.default_rng(seed), dtype, 1, 99, 200, 2, 2, 128, 3.0)
        compare(xp, dtype, found, arrays, causal=True, q_offset=101)
    check_together(found, dtype, f"attention, large scores {kernels}")


def test_what_lies_beyond_the_end_is_not_used(xp, kernels, dtype):
    rng = np.random.default_rng(0)
    arrays = inputs(rng, dtype, 1, 70, 140, 2, 2, 64)
    for array in arrays[1:]:
        array[:, 133:] = np.nan
    found = []
    compare(xp, dtype, found, arrays, lengths=np.array([133], INT))
    check_together(found, dtype, "attention beside NaN")


@pytest.mark.parametrize("size", [64, 96, 128])
def test_strides(xp, kernels, dtype, size):
    """Sides of one array, heads before tokens, one key for all sequences."""
    rng = np.random.default_rng(0)
    qkv = draw(rng, (2, 100, 3, 4, size), dtype)
    packed = on(xp, qkv)[0]
    exact = reference.attention(*(wide(qkv[:, :, i])[0] for i in range(3)), True)
    baseline = reference.attention(*(qkv[:, :, i] for i in range(3)), True)
    ours = ops.attention(*(packed[:, :, i] for i in range(3)), True)
    check(host(ours), baseline, exact, dtype, "sides")
    # [B, NH, T, HS], as PyTorch has them; the result likewise.
    turned = [on(xp, np.ascontiguousarray(qkv[:, :, i].transpose(0, 2, 1, 3)))[0] for i in range(3)]
    out = xp.empty_like(turned[0])
    views = [array.transpose(0, 2, 1, 3) for array in (*turned, out)]
    again = ops.attention(*views[:3], True, out=views[3])
    assert again is views[3]
    np.testing.assert_array_equal(host(out).transpose(0, 2, 1, 3), host(ours))
    if xp is np:
        return
    one = packed[:1, :, 1], packed[:1, :, 2]
    spread = [xp.broadcast_to(each, (2, *each.shape[1:])) for each in one]
    both = ops.attention(packed[:, :, 0], *spread)
    copied = ops.attention(packed[:, :, 0].copy(), *(each.copy() for each in spread))
    np.testing.assert_array_equal(host(both), host(copied))


def test_a_sequence_does_not_feel_the_others(xp, kernels, dtype):
    arrays = on(xp, *inputs(np.random.default_rng(0), dtype, 3, 200, 200, 4, 2, 64))
    together = host(ops.attention(*arrays, True))
    for b in range(3):
        alone = ops.attention(*(array[b : b + 1] for array in arrays), True)
        if xp is not np:
            np.testing.assert_array_equal(host(alone)[0], together[b])


@pytest.mark.gpu
def test_the_ladders_agree(dtype):
    """Each step computes the same: attention's kernels, and those of one token over its cache."""
    import cupy

    q, k, v = inputs(np.random.default_rng(0), dtype, 2, 130, 150, 4, 2, 64)
    lengths = np.array([150, 99], INT)
    given = on(cupy, q, k, v, lengths)
    for step in KERNELS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(of_decode, "_MOST_SPLITS", 2)
            for _ in forced(patch, step):
                ours = ops.attention(*given[:3], True, None, given[3], 20)
                token = ops.decode_attention(given[0][:, 0], *given[1:])
        options = {"causal": True, "lengths": lengths, "q_offset": 20}
        exact, baseline = (reference.attention(*a, **options) for a in (wide(q, k, v), (q, k, v)))
        check(host(ours), baseline, exact, dtype, f"attention {step}")
        one, least = (
            reference.decode_attention(a[0][:, 0], *a[1:], lengths)
            for a in (wide(q, k, v), (q, k, v))
        )
        check(host(token), least, one, dtype, f"decode_attention {step}")
    # Heads that share keys, of which a block has all.
    with pytest.MonkeyPatch.context() as patch:
        for _ in forced(patch, "plain"):
            for kv in (1, 2, 4, 8):
                few = q[:, 0].repeat(2, 1), k[:, :, :1].repeat(kv, 2), v[:, :, :1].repeat(kv, 2)
                token = ops.decode_attention(*on(cupy, *few, lengths))
                one, least = (reference.decode_attention(*a, lengths) for a in (wide(*few), few))
                check(host(token), least, one, dtype, f"decode_attention 8/{kv}")
    # Whole tiles, which the copy engine brings where there is one.
    part = [each[:, :128] for each in (q, k, v)]
    exact, baseline = (reference.attention(*a, True) for a in (wide(*part), part))
    ours = ops.attention(*(each[:, :128] for each in given[:3]), True)
    check(host(ours), baseline, exact, dtype, "attention of whole tiles")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("tokens", [2048, 2100])
def test_many_tiles(kernels_of_cupy, dtype, tokens, causal):
    """More tiles than blocks that stay, each with many tiles of keys."""
    import cupy

    arrays = inputs(np.random.default_rng(0), dtype, 1, tokens, tokens, 16, 4, 128)
    given = on(cupy, *arrays)
    ours = host(ops.attention(*given, causal))
    rows = np.array([0, 1, 127, 128, 989, 1500, tokens - 1])
    part = [arrays[0][:, rows], *arrays[1:]]
    found = []
    for n, t in enumerate(rows):
        each = [part[0][:, n : n + 1], *part[1:]]
        options = {"causal": causal, "q_offset": int(t) if causal else 0}
        found.append(
            (
                ours[:, t : t + 1],
                reference.attention(*each, **options),
                reference.attention(*wide(*each), **options),
            )
        )
    check_together(found, dtype, f"attention, many tiles {kernels_of_cupy}")
    np.testing.assert_array_equal(host(ops.attention(*given, causal)), ours)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("heads_first", [False, True])
def test_whole_tiles_elsewhere(dtype, size, heads_first):
    """The copy engine is told anew where arrays lie: in a call that is found again, too."""
    import cupy

    found = []
    for seed in SEEDS[:3]:
        arrays = inputs(np.random.default_rng(seed), dtype, 2, 256, 384, 4, 2, size)
        given = on(cupy, *arrays)
        if heads_first:
            given = [cupy.ascontiguousarray(a.transpose(0, 2, 1, 3)) for a in given]
            given = [a.transpose(0, 2, 1, 3) for a in given]
        for causal in (False, True):
            ours = ops.attention(*given, causal, out=cupy.empty(arrays[0].shape, dtype))
            baseline = reference.attention(*arrays, causal)
            found.append((host(ours), baseline, reference.attention(*wide(*arrays), causal)))
    check_together(found, dtype, f"attention of whole tiles of {size}")


# -- one token a sequence -------------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 64, 72, 80, 128])
@pytest.mark.parametrize("heads, kv", [(2, 2), (8, 1), (20, 1), (6, 2)])
def test_decode(xp, kernels, dtype, size, heads, kv):
    found = []
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        lengths = np.array([0, 1, 19, 99, 989], INT)
        q = draw(rng, (5, heads, size), dtype)
        k, v = (draw(rng, (5, 989, kv, size), dtype) for _ in "kv")
        ours = ops.decode_attention(*on(xp, q, k, v, lengths))
        assert ours.dtype == dtype and ours.shape == q.shape
        exact = reference.decode_attention(*wide(q, k, v), lengths)
        found.append((host(ours), reference.decode_attention(q, k, v, lengths), exact))
        assert not found[-1][0][0].any()
        if xp is np:
            break
    check_together(found, dtype, f"decode_attention {heads}/{kv} x {size} {kernels}")


@pytest.mark.gpu
@pytest.mark.parametrize("batch, kv", [(1, 1), (1, 8), (64, 1)])
def test_decode_of_long_sequences(kernels_of_cupy, dtype, batch, kv):
    import cupy

    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 5000, batch).astype(INT)
    q = draw(rng, (batch, 4 * kv, 128), dtype)
    k, v = (draw(rng, (batch, 5000, kv, 128), dtype) for _ in "kv")
    given = on(cupy, q, k, v, lengths)
    ours = host(ops.decode_attention(*given))
    some = slice(0, 4)
    exact = reference.decode_attention(*wide(q[some], k[some], v[some]), lengths[some])
    baseline = reference.decode_attention(q[some], k[some], v[some], lengths[some])
    check(ours[some], baseline, exact, dtype, f"decode_attention {batch} {kernels_of_cupy}")
    np.testing.assert_array_equal(host(ops.decode_attention(*given)), ours)


def test_decode_reads_nothing_beyond_the_end_and_any_strides(xp, kernels, dtype):
    rng = np.random.default_rng(0)
    q = draw(rng, (2, 4, 64), dtype)
    cache = draw(rng, (2, 2, 50, 2, 64), dtype)
    lengths = np.array([33, 50], INT)
    cache[:, 0, 33:] = np.nan
    exact = reference.decode_attention(*wide(q, *cache), lengths)
    baseline = reference.decode_attention(q, *cache, lengths)
    assert np.isfinite(exact).all()
    # Slots of heads, as caches of some engines are.
    k, v = (on(xp, np.ascontiguousarray(c.transpose(0, 2, 1, 3)))[0] for c in cache)
    views = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    ours = ops.decode_attention(*on(xp, q), *views, *on(xp, lengths))
    check(host(ours), baseline, exact, dtype, "decode_attention of views")


# -- the reference --------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.data())
def test_the_reference_is_the_formula(data):
    draw_int = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    batch, queries, keys = draw_int(1, 3), draw_int(1, 6), draw_int(1, 7)
    kv, share, size = draw_int(1, 2), draw_int(1, 3), 8 * draw_int(1, 3)
    rng = np.random.default_rng(draw_int(0, 99))
    q, k, v = wide(*inputs(rng, np.float32, batch, queries, keys, kv * share, kv, size))
    causal = data.draw(st.booleans())
    options = {"causal": causal, "scale": data.draw(st.sampled_from([None, 0.1, 2.0]))}
    options["lengths"] = data.draw(st.sampled_from([None, rng.integers(0, keys + 1, batch, INT)]))
    if causal:
        one, each = draw_int(0, 9), rng.integers(-3, 9, batch, INT)
        options["q_offset"] = data.draw(st.sampled_from([one, each]))
    found = ops.attention(q, k, v, **options)
    np.testing.assert_allclose(found, formula(q, k, v, **options), rtol=1e-12, atol=1e-12)
    lengths = rng.integers(0, keys + 1, batch, INT)
    token = ops.decode_attention(q[:, 0], k, v, lengths)
    np.testing.assert_allclose(
        token, formula(q[:, :1], k, v, lengths=lengths)[:, 0], rtol=1e-12, atol=1e-12
    )


# -- bad input ------------------------------------------------------------------------------------


def arrays_of(xp, dtype=np.float32, size=32, heads=4, kv=2):
    return on(xp, *inputs(np.random.default_rng(0), dtype, 2, 5, 7, heads, kv, size))


def spoiled(xp):
    """(argument, what to call with)."""
    q, k, v = arrays_of(xp)
    counts = xp.zeros(2, INT)
    yield "q", ((q[0], k, v), {})
    yield "k", ((q, k[0], v), {})
    yield "v", ((q, k, v[:, :6]), {})
    yield "v", ((q, k, v.astype(np.float16)), {})
    yield "k", ((q, k.astype(np.float16), v), {})
    yield "k", ((q, k[:1], v), {})
    yield "k", ((q[:, :, :3], k, v), {})
    yield "q", ((q.astype(np.int32), k, v), {})
    yield "q", (tuple(arrays_of(xp, size=59)), {})
    yield "q", (tuple(arrays_of(xp, size=136)), {})
    yield "q", (([1.0], k, v), {})
    yield "k", ((q, None, v), {})
    yield "scale", ((q, k, v, True, 0.0), {})
    yield "scale", ((q, k, v, True, -1.0), {})
    yield "scale", ((q, k, v, True, float("nan")), {})
    yield "scale", ((q, k, v, True, "1"), {})
    yield "lengths", ((q, k, v), {"lengths": counts[:1]})
    yield "lengths", ((q, k, v), {"lengths": counts.astype(np.int64)})
    yield "lengths", ((q, k, v), {"lengths": 3})
    yield "q_offset", ((q, k, v), {"q_offset": 1})
    yield "q_offset", ((q, k, v), {"q_offset": counts})
    yield "q_offset", ((q, k, v, True), {"q_offset": -1})
    yield "q_offset", ((q, k, v, True), {"q_offset": counts[:1]})
    yield "q_offset", ((q, k, v, True), {"q_offset": 1.5})
    yield "q_offset", ((q, k, v, True), {"q_offset": True})
    yield "out", ((q, k, v), {"out": xp.empty_like(q[:, :4])})


@pytest.mark.parametrize("number", range(26))
def test_bad_input_is_refused_by_name(xp, number):
    cases = list(spoiled(xp))
    assert len(cases) == 26
    name, (args, options) = cases[number]
    with pytest.raises(InputError) as caught:
        ops.attention(*args, **options)
    assert name in caught.value.where.split(": ")[-1] or caught.value.what.startswith(f"{name} ")
    assert caught.value.remedy


@pytest.mark.gpu
def test_layouts_that_kernels_cannot_take_are_refused_by_name():
    import cupy

    q, k, v = arrays_of(cupy)
    big = cupy.zeros((2, 5, 4, 33), np.float32)
    for name, args, options in (
        ("q", (cupy.repeat(q, 2, -1)[..., ::2], k, v), {}),
        ("k", (q, k[:, ::-1], v), {}),
        ("q", (big[..., :32], k, v), {}),
        ("out", (q, k, v), {"out": q}),
        ("out", (q, k, v), {"out": cupy.broadcast_to(q[:, :1], q.shape)}),
        ("k", (q, k.get(), v), {}),
        ("q", tuple(each.astype(np.float64) for each in (q, k, v)), {}),
    ):
        with pytest.raises(InputError) as caught:
            ops.attention(*args, **options)
        assert name in f"{caught.value.where} {caught.value.what}".replace(":", "").split()
    with pytest.raises(InputError, match="lengths"):
        ops.decode_attention(q[:, 0], k, v, None)


def test_decode_refuses_by_name(xp):
    q, k, v = arrays_of(xp)
    counts = xp.zeros(2, INT)
    for name, args in (
        ("q", (q, k, v, counts)),
        ("k", (q[:, 0], k[0], v, counts)),
        ("v", (q[:, 0], k, v[:, :3], counts)),
        ("lengths", (q[:, 0], k, v, None)),
        ("lengths", (q[:, 0], k, v, counts.astype(np.int64))),
        ("scale", (q[:, 0], k, v, counts, -1.0)),
    ):
        with pytest.raises(InputError) as caught:
            ops.decode_attention(*args)
        assert name in caught.value.where.split(": ")[-1]


def test_nothing_to_do(xp):
    q, k, v = arrays_of(xp)
    assert ops.attention(q[:0], k[:0], v[:0]).shape == (0, 5, 4, 32)
    assert ops.attention(q[:, :0], k, v).shape == (2, 0, 4, 32)
    assert not host(ops.attention(q, k[:, :0], v[:, :0])).any()
    counts = xp.zeros(2, INT)
    assert not host(ops.decode_attention(q[:, 0], k[:, :0], v[:, :0], counts)).any()
    assert ops.decode_attention(q[:0, 0], k[:0], v[:0], counts[:0]).shape == (0, 4, 32)
    # Made and no view, it has strides of 0.
    none = [xp.empty((0, *each.shape[1:]), each.dtype) for each in (q, k, v)]
    for out in (q[:0], xp.empty_like(none[0])):
        assert ops.attention(*none, out=out) is out
    out = xp.empty((0, 4, 32), q.dtype)
    assert ops.decode_attention(none[0][:, 0], *none[1:], counts[:0], out=out) is out


def test_strides_of_what_has_no_elements_are_no_reason_to_refuse_it():
    """As CuPy's arrays have them, to the launcher and to the plan of a call."""
    shape, none = (0, 5, 4, 32), (0, 0, 0, 0)
    empty = np.lib.stride_tricks.as_strided(np.empty(0, np.float16), shape, none)
    assert signature.strides(empty) == none[1:]
    reference.check_aligned("attention", out=reference.facts(empty))


@given(st.integers(1, 600), st.integers(1, 600), st.integers(1, 64))
def test_parts_of_a_sequence_fill_waves(blocks, resident, most):
    found = of_decode._splits(blocks, resident, most)
    assert 1 <= found <= most

    def filled(splits):
        return blocks * splits / (-(-blocks * splits // resident) * resident)

    assert found == 1 or blocks * found <= of_decode._WAVES * resident
    assert filled(found) >= filled(1)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 140), st.integers(1, 40))
def test_tiles_are_dealt_out_so_that_blocks_end_together(tiles, heads, blocks, most):
    """By a count of what each block gets, item by item as the kernel numbers them."""
    costs = np.arange(1, tiles + 1) + module._ITEM
    most, blocks = min(most, heads), min(blocks, tiles * heads)

    def longest(together):
        taken = [0.0] * blocks
        for number in range(tiles * heads):
            turn, place = divmod(number, blocks)
            group, rest = divmod(number, together * tiles)
            count = min(together, heads - group * together)
            taken[blocks - 1 - place if turn % 2 else place] += costs[tiles - 1 - rest // count]
        return max(taken)

    found = module._together(costs, heads, blocks, most)
    assert 1 <= found <= most
    assert longest(found) <= min(longest(1), longest(most)) + 1e-9


def test_costs():
    q, k, v = arrays_of(np)
    full = ops.attention.cost(q, k, v)
    assert full.flops == 4 * 2 * 4 * 32 * 5 * 7
    assert full.bytes == 2 * q.nbytes + k.nbytes + v.nbytes
    assert ops.attention.cost(q, k, v, True).flops == 4 * 2 * 4 * 32 * (1 + 2 + 3 + 4 + 5)
    assert ops.attention.cost(q, k, v, True, q_offset=4).flops == 4 * 2 * 4 * 32 * (5 + 6 + 7 * 3)
    counts = np.array([7, 3], INT)
    one = ops.decode_attention.cost(q[:, 0], k, v, counts, context=5)
    assert one.flops == 4 * 2 * 4 * 32 * 5
    assert one.bytes == 2 * q[:, 0].nbytes + counts.nbytes + 2 * 2 * 5 * 2 * 32 * 4
