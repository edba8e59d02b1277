"""Bad ``out=``, positions, ids and devices: an error that names the argument, or the right result.

What is spoiled comes after a call that was right, whose plan must not be taken for it.
"""

from __future__ import annotations

import numpy as np
import pytest
from builders import host
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import reference

BOTH = pytest.mark.parametrize("where", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
TABLES = ops.rope_tables(16, 8)
IDS = np.array([0, -1, 1, 0], np.int32)
# The op, and its inputs made of rows x [N, 8]; the last is out.
CALLS = {
    "layer_norm": lambda xp, x, out: ops.layer_norm(x, x[0], x[0], out=out),
    "rms_norm": lambda xp, x, out: ops.rms_norm(x, x[0], out=out),
    "gelu": lambda xp, x, out: ops.gelu(x, "tanh", out=out),
    "bias_gelu": lambda xp, x, out: ops.bias_gelu(x, x[0], out=out),
    "silu_mul": lambda xp, x, out: ops.silu_mul(x, x, out=out),
    "softmax": lambda xp, x, out: ops.softmax(x, out=out),
    "add_rms_norm": lambda xp, x, out: ops.add_rms_norm(x, x, x[0], out=(out, None))[0],
    "add_layer_norm": lambda xp, x, out: ops.add_layer_norm(x, x, x[0], x[0], out=(None, out))[1],
    "lookup": lambda xp, x, out: ops.lookup(xp.asarray(IDS[: len(x)]), x, out=out),
    "rope": lambda xp, x, out: ops.rope(
        x[:, None], *map(xp.asarray, TABLES), out=out[:, None] if out.ndim == 2 else out
    ),
}
# What takes the place of out [N, 8].
OUTS = {
    "right": lambda xp, n: xp.zeros((n, 8), np.float32),
    "rows of more": lambda xp, n: xp.zeros((n, 12), np.float32)[:, :8],
    "every other column": lambda xp, n: xp.zeros((n, 16), np.float32)[:, ::2],
    "float16": lambda xp, n: xp.zeros((n, 8), np.float16),
    "float64": lambda xp, n: xp.zeros((n, 8)),
    "int32": lambda xp, n: xp.zeros((n, 8), np.int32),
    "one row less": lambda xp, n: xp.zeros((n - 1, 8), np.float32),
    "one column less": lambda xp, n: xp.zeros((n, 7), np.float32),
    "one dimension more": lambda xp, n: xp.zeros((1, n, 8), np.float32),
    "flat": lambda xp, n: xp.zeros(n * 8, np.float32),
}
FITS = {"right", "rows of more", "every other column"}


@BOTH
@settings(max_examples=200)
@given(name=st.sampled_from(list(CALLS)), rows=st.integers(1, 4), how=st.sampled_from(list(OUTS)))
def test_a_spoiled_output(where, name, rows, how):
    xp = pytest.importorskip(where)
    x = np.random.default_rng(rows).standard_normal((rows, 8), dtype=np.float32)
    call, given_ = CALLS[name], xp.asarray(x)
    expected = call(np, x, np.zeros_like(x))
    for _ in range(2):  # the second is found again
        right = call(xp, given_, xp.zeros((rows, 8), np.float32))
    np.testing.assert_allclose(host(right), expected, rtol=2e-4, atol=2e-5)
    out = OUTS[how](xp, rows)
    before = host(out).copy()
    try:
        found = call(xp, given_, out)
    except InputError as error:
        assert error.where and error.remedy
        assert how != "right" and not (how in FITS and where == "numpy"), error
        assert any(word in str(error) for word in ("out", "total", "y is")), error
        np.testing.assert_array_equal(host(out), before)
        return
    ravelled = how == "one dimension more" or (how == "flat" and rows == 1)
    the_same = name == "rope" and rows == 1  # whose output has a dimension more anyway
    assert how in FITS or (ravelled and the_same)
    for array in (host(found), host(out)):
        np.testing.assert_allclose(array.ravel(), expected.ravel(), rtol=2e-4, atol=2e-5)


@BOTH
@pytest.mark.parametrize(
    "positions",
    [np.zeros(2, np.int32), np.zeros(3, np.float32), np.zeros((3, 2), np.int32)],
    ids=["too few", "no integers", "too many"],
)
def test_spoiled_positions(where, positions):
    xp = pytest.importorskip(where)
    x = xp.ones((3, 8), np.float32)
    for call in (
        lambda given_: ops.rope(x[:, None], *map(xp.asarray, TABLES), given_),
        lambda given_: ops.sample_logits(x, given_),
    ):
        call(xp.zeros(3, np.int32))
        with pytest.raises(InputError, match="positions is"):
            call(xp.asarray(positions))


@BOTH
def test_ids_go_to_integers_of_a_row_each(where):
    xp = pytest.importorskip(where)
    logits = xp.asarray(np.random.default_rng(0).standard_normal((3, 50), dtype=np.float32))
    expected = reference.sample_logits(host(logits), seed=4)
    out = xp.zeros(3, np.int32)
    assert ops.sample_logits(logits, seed=4, out=out) is out
    np.testing.assert_array_equal(host(out), expected)
    for wrong in (xp.zeros(3, np.float32), xp.zeros(2, np.int32), xp.zeros((1, 3), np.int32)):
        with pytest.raises(InputError, match=r"(out|ids) is"):
            ops.sample_logits(logits, seed=4, out=wrong)


@pytest.mark.parametrize("given_", [[1.0, 2.0], 3.0, np.ones((2, 8), np.int32), np.ones(3, bool)])
def test_what_is_no_array_of_real_numbers_is_refused_by_name(given_):
    for call in (
        lambda x: ops.layer_norm(x, None, None),
        lambda x: ops.rms_norm(x, None),
        lambda x: ops.gelu(x),
        lambda x: ops.softmax(x),
    ):
        with pytest.raises(InputError, match=r"^x is ") as caught:
            call(given_)
        assert caught.value.remedy


@pytest.mark.gpu
def test_arrays_on_two_gpus_are_refused_by_name():
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one GPU")
    x, w = cupy.ones((2, 8), np.float32), cupy.ones(8, np.float32)
    out = cupy.empty_like(x)
    for _ in range(2):
        ops.rms_norm(x, w, out=out)
    with cupy.cuda.Device(1):
        elsewhere = cupy.ones(8, np.float32)
        with pytest.raises(InputError, match="on device 0"):
            ops.rms_norm(x, w, out=out)
    with pytest.raises(InputError, match=r"weight is .* on device 1"):
        ops.rms_norm(x, elsewhere, out=out)
