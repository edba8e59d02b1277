"""Every argument of every op with every odd value: it works, or the error is one of ours."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
from odd_values import ODD, tried
from op_checks import draw
from op_rows import ROWS

from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops.core import registry

INT, FLOAT = np.int32, np.dtype(np.float32)


def _ints(*values):
    return np.array(values, INT)


def _bytes(*shape):
    return np.zeros(shape, np.uint8)


def _elsewhere(rng):
    """A call of each op that has no row in op_rows.py."""
    cache = draw(rng, (3, 2, 16, 32)), draw(rng, (3, 2, 16, 32))
    steps = np.zeros(4, np.uint32)
    history, four = np.zeros(16, INT), _ints(3, 4, 5, 6)
    matrix, logits = draw(rng, (4, 64)), draw(rng, (2, 128))
    state = _ints(0, 2), _bytes(4, 48), four, four.copy(), steps, _bytes(4, 8, 16)
    return {
        "accept_drafts": (four, four.copy(), four.copy(), _bytes(2, 1, 16), history, steps,
                          _bytes(4, 8, 16)),
        "copy_slots": (*(each[None] for each in cache), _ints(0), _ints(1), _ints(3)),
        "dequantize": (ops.quantize(matrix), FLOAT),
        "gemv": (matrix[:1], matrix),
        "propose_drafts": (_ints(3, -1, -1), _ints(4, 0, 0), history),
        "quantize": (matrix,),
        "rope_tables": (16, 8),
        "sample": (logits, 100, *state),
        "sample_logits": (logits, _ints(0, 1)),
        "store_kv": (draw(rng, (2, 192)), *cache, _ints(0, 1), _ints(3, 4)),
        "top_logprobs": (logits, 100, 4),
    }  # fmt: skip


def call_of(name):
    """The op, and its arguments by name, all that have a default too."""
    rng, function = np.random.default_rng(0), getattr(ops, name)
    args, options = ROWS[name](rng, FLOAT) if name in ROWS else (_elsewhere(rng)[name], {})
    bound = inspect.signature(function).bind(*args, **options)
    bound.apply_defaults()
    return function, dict(bound.arguments)


def copied(value):
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    return value.copy() if isinstance(value, np.ndarray) else value


def spoiled(value):
    """What an array may be in place of the right one."""
    if not isinstance(value, np.ndarray):
        return
    yield from (value.astype(kind) for kind in (np.float64, np.float16, np.int8, complex, object))
    yield from (value[None], value[:0], value[..., :-1], value[..., ::2], value.T, value.ravel())
    locked = value.copy()
    locked.flags.writeable = False
    yield locked


@pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore:.*discards the imaginary part")
@pytest.mark.parametrize("name", ops.__all__)
def test_odd_values_of_ops(name):
    function, usual = call_of(name)
    for argument, right in usual.items():
        for value in (*ODD, *spoiled(right)):
            tried(function, **(copied_of(usual) | {argument: copied(value)}))


def copied_of(arguments):
    return {name: copied(value) for name, value in arguments.items()}


# Ops for everybody, whose arguments are checked before anything is computed.
LIBRARY = [
    name
    for name in ops.__all__
    if name in registry.registered or getattr(ops, name)
    if name in (
        "add_layer_norm", "add_rms_norm", "attention", "bias_gelu", "decode_attention", "ffn",
        "gelu", "layer_norm", "layer_norm_backward", "linear", "lookup", "rms_norm",
        "rms_norm_backward", "rope", "sample_logits", "silu_mul", "softmax",
    )
]  # fmt: skip
# Where another dtype stands alone, or beside tables of float32.
FREE = {
    "gelu",
    "softmax",
    "sample_logits",
    ("lookup", "table"),
    ("rope", "x"),
    ("rms_norm", "weight"),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_other_dtypes_are_refused_by_name(name):
    function, usual = call_of(name)
    for argument, right in usual.items():
        if not isinstance(right, np.ndarray):
            continue
        kinds = [np.int16, complex, np.uint8, bool]
        if right.dtype == FLOAT and not {name, (name, argument)} & FREE:
            kinds += [np.float16]
        if right.dtype == INT:
            kinds += [np.float32, np.uint32]
        for kind in kinds:
            with pytest.raises(InputError) as caught:
                function(**(copied_of(usual) | {argument: right.astype(kind)}))
            assert caught.value.where.startswith(f"{name}: ")


@pytest.mark.parametrize("name", [name for name in LIBRARY if "backward" not in name])
def test_an_output_that_overlaps_an_input_is_refused(name):
    function, usual = call_of(name)
    result = function(**usual)
    result = result[0] if isinstance(result, tuple) else result
    argument = next(n for n, v in usual.items() if getattr(v, "dtype", None) == result.dtype)
    right = usual[argument]
    memory = np.zeros(right.size + result.size, right.dtype)
    given = memory[: right.size].reshape(right.shape)
    given[:] = right
    out = memory[1 : 1 + result.size].reshape(result.shape)
    before = memory.copy()
    pair = (out, None) if name.startswith("add_") else out
    with pytest.raises(InputError, match=r"^out(\.0)? shares memory with"):
        function(**(usual | {argument: given, "out": pair}))
    np.testing.assert_array_equal(memory, before)


def test_an_output_that_nothing_can_be_written_to_is_refused():
    x = np.ones((2, 8), np.float32)
    for out in (np.broadcast_to(np.float32(0), (2, 8)), np.lib.stride_tricks.as_strided(
        np.zeros(8, np.float32), (2, 8), (0, 4))):  # fmt: skip
        with pytest.raises(InputError, match=r"^out is "):
            ops.softmax(x, out=out)
