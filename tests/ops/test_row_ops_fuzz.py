"""Bad input of the row ops: an error that names the argument, or the right result."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from builders import host
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops import reference
from gpt2cupy.ops.core import overlap, signature

BOTH = pytest.mark.parametrize("where", ["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
LEADING = st.lists(st.integers(0, 3), max_size=3).map(tuple)
WIDTH = st.sampled_from([1, 2, 7, 8, 16, 19, 33, 64])
# How an input is spoiled: a view of what it should be, of another width, dtype or rank.
VIEWS = {
    "as it is": lambda x: x,
    "columns of more": lambda x: np.repeat(x, 2, -1)[..., : x.shape[-1]] if x.ndim else x,
    "every other column": lambda x: np.repeat(x, 2, -1)[..., ::2] if x.ndim else x,
    "rows backwards": lambda x: x[::-1] if x.ndim > 1 else x,
    "transposed": lambda x: np.ascontiguousarray(x.T).T,
    "every other row": lambda x: np.repeat(x, 2, 0)[::2] if x.ndim > 1 else x,
    "a row for all": lambda x: np.broadcast_to(x[:1], x.shape) if x.ndim > 1 else x,
    "not at 16 bytes": lambda x: np.concatenate([np.zeros(1, x.dtype), x.ravel()])[1:].reshape(
        x.shape
    ),
    "one column less": lambda x: x[..., 1:] if x.ndim else x,
    "float64": lambda x: x.astype(np.float64),
    "int32": lambda x: x.astype(np.int32),
    "a number": lambda x: np.array(1, x.dtype),
    "one more dimension": lambda x: x[None],
}
OPS = {
    "layer_norm": "xww",
    "rms_norm": "xw",
    "add_layer_norm": "xxww",
    "add_rms_norm": "xxw",
    "layer_norm_backward": "xxw",
    "rms_norm_backward": "xxw",
    "gelu": "x",
    "bias_gelu": "xw",
    "silu_mul": "xx",
    "softmax": "x",
}


def as_is(xp, array):
    """The array, a view of the same strides, in the memory of a GPU."""
    if xp is np or array.dtype == object:
        return array
    if array.base is None or not array.size:
        return xp.asarray(array)
    base = array
    while base.base is not None:
        base = base.base
    lies = xp.asarray(base).view().ravel()
    start = (array.__array_interface__["data"][0] - base.__array_interface__["data"][0]) // (
        array.itemsize
    )
    return xp.lib.stride_tricks.as_strided(lies[start:], array.shape, array.strides)


@BOTH
@settings(max_examples=300)
@given(
    name=st.sampled_from(list(OPS)),
    leading=LEADING,
    width=WIDTH,
    seed=st.integers(0, 9),
    spoiled=st.integers(0, 3),
    how=st.sampled_from(list(VIEWS)),
)
def test_a_spoiled_input(where, name, leading, width, seed, spoiled, how):
    xp = pytest.importorskip(where)
    rng = np.random.default_rng(seed)
    args = [
        rng.standard_normal((*leading, width) if kind == "x" else (width,), dtype=np.float32)
        for kind in OPS[name]
    ]
    place = spoiled % len(args)
    args[place] = VIEWS[how](args[place])
    alike = {a.shape for a, kind in zip(args, OPS[name], strict=True) if kind == "x"}
    fits = len(alike) == 1 and all(a.dtype == np.float32 for a in args)
    shape = next(iter(alike))
    fits = fits and all(
        a.shape == shape[-1:] for a, kind in zip(args, OPS[name], strict=True) if kind == "w"
    )
    fits = fits and shape != ()
    given_ = [as_is(xp, a) for a in args]
    try:
        found = getattr(ops, name)(*given_)
    except InputError as error:
        assert error.where and error.remedy
        assert not (fits and how == "as it is"), error
        # NumPy takes every view.
        assert not (fits and where == "numpy"), error
        return
    if not fits:
        # What has another dtype, or one row more, may be computed, but then rightly.
        assert where == "numpy" or how in ("float64", "int32", "one more dimension"), (how, found)
        return
    expected = getattr(reference, name)(*(np.array(a) for a in args))
    found, expected = (r if isinstance(r, tuple) else (r,) for r in (found, expected))
    for mine, true in zip(found, expected, strict=True):
        assert mine.shape == true.shape
        np.testing.assert_allclose(host(mine), true, rtol=2e-4, atol=2e-5)


@BOTH
@settings(max_examples=200)
@given(
    name=st.sampled_from(["layer_norm", "rms_norm", "bias_gelu", "silu_mul", "softmax"]),
    rows=st.integers(1, 4),
    width=st.sampled_from([4, 8, 12]),
    shift=st.integers(-6, 6),
    pitch=st.sampled_from([12, 16, 24]),
)
def test_an_output_in_the_memory_of_an_input(where, name, rows, width, shift, pitch):
    xp = pytest.importorskip(where)
    rng = np.random.default_rng(rows * 100 + width + shift)
    memory = rng.standard_normal(400, dtype=np.float32)
    start = 100

    def rows_at(memory, first):
        return memory[first : first + rows * pitch].reshape(rows, pitch)[:, :width]

    params = [rng.standard_normal(width, dtype=np.float32) for _ in OPS[name].replace("x", "")]
    if name == "silu_mul":
        params = [rng.standard_normal((rows, width), dtype=np.float32)]
    expected = getattr(reference, name)(rows_at(memory, start).copy(), *params)
    lies = xp.asarray(memory.copy())
    x, out = rows_at(lies, start), rows_at(lies, start + 4 * shift)
    try:
        getattr(ops, name)(x, *(xp.asarray(p) for p in params), out=out)
    except InputError as error:
        assert shift and "out shares memory with" in str(error)
        return
    np.testing.assert_allclose(host(out), expected, rtol=2e-4, atol=2e-5)


class Placed(np.ndarray):
    """An array with what launch() looks at in a GPU's."""

    @property
    def data(self):
        return SimpleNamespace(ptr=self.ctypes.data, device_id=0)

    @property
    def _c_contiguous(self):
        return self.flags.c_contiguous


PAIR = tuple(map(signature.parse, ("x: float32[*N,C]", "out: float32[*N,C]~", "N", "C")))


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 9),
    pitches=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    starts=st.tuples(st.integers(0, 40), st.integers(0, 40)),
)
def test_two_views_meet_where_numpy_says_so(rows, width, pitches, starts):
    memory = np.zeros(200, np.float32)
    x, out = (
        np.lib.stride_tricks.as_strided(
            memory[start:], (rows, width), ((width + more) * 4, 4)
        ).view(Placed)
        for start, more in zip(starts, pitches, strict=True)
    )
    (pair,) = overlap.neighbours(PAIR, (x, out))
    distance = out.data.ptr - x.data.ptr
    found = overlap.meet(pair, distance)
    shared = np.shares_memory(x, out)
    if rows == 1:
        itself = starts[0] == starts[1]
    else:
        itself = starts[0] == starts[1] and pitches[0] == pitches[1]
    if shared and not itself:
        assert found
    if itself and pitches[0] == pitches[1]:
        assert not found
    if pitches[0] == pitches[1]:
        assert found == (shared and not itself)


@given(
    shape=st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple),
    how=st.sampled_from([name for name in VIEWS if name != "a number"]),
    kept=st.integers(0, 2),
)
def test_rows_of_a_view_are_where_they_are_said_to_be(shape, how, kept):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    x = np.asarray(VIEWS[how](x)).view(Placed)
    found = signature.rows(x, kept)
    if found is None:
        assert not x._c_contiguous or x.ndim < kept
        return
    count, *row, stride = found
    assert tuple(row) == x.shape[x.ndim - kept :]
    if not x.size:
        return
    length = int(np.prod(row, dtype=int))
    seen = np.lib.stride_tricks.as_strided(
        np.asarray(x), (count, length), (stride * x.itemsize, x.itemsize)
    )
    np.testing.assert_array_equal(seen, np.ascontiguousarray(x).reshape(count, length))
