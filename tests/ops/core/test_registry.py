"""@op: dispatch, the oracle, the cost and the observer; and every op by its row of op_rows.py."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
import threading
import types

import numpy as np
import pytest
from builders import host
from error_rule import check
from op_rows import ELSEWHERE, ROWS

import gpt2cupy.ops
from gpt2cupy import ops
from gpt2cupy.errors import InputError
from gpt2cupy.ops.core import registry
from gpt2cupy.ops.core.registry import Cost, moved, op, written
from gpt2cupy.record import ROOT

for _module in pkgutil.walk_packages(gpt2cupy.ops.__path__, "gpt2cupy.ops."):
    importlib.import_module(_module.name)
EVERY = dict(registry.registered)


def test_every_op_has_a_row_or_tests_elsewhere():
    assert set(EVERY) == {*ROWS, *ELSEWHERE}
    assert all((ROOT / "tests" / name).exists() for name in ELSEWHERE.values())
    # Tables are made on the host, for an op that reads them.
    assert set(ops.__all__) - {"rope_tables"} <= set(EVERY)


@pytest.mark.parametrize("name", [name for name, each in EVERY.items() if each.reference])
def test_the_oracle_has_the_signature_of_the_op(name):
    ours = inspect.signature(EVERY[name]).parameters
    theirs = inspect.signature(EVERY[name].reference.function).parameters
    assert list(ours) == list(theirs)
    assert [p.default for p in ours.values()] == [p.default for p in theirs.values()]
    assert EVERY[name].__doc__


def converted(value, convert):
    """A value of a row with every array in it converted; each is a copy."""
    if isinstance(value, np.ndarray):
        return convert(value.copy())
    if isinstance(value, tuple):
        return tuple(converted(each, convert) for each in value)
    return value


def arrays(value):
    """Every array in the results and arguments of a call, on the host."""
    if isinstance(value, tuple):
        return [array for each in value for array in arrays(each)]
    return [host(value)] if hasattr(value, "dtype") else []


def called(function, row, convert):
    """All arrays after a call: what it returns, and what it was given and may have changed."""
    args, options = row
    args = converted(args, convert)
    options = {key: converted(value, convert) for key, value in options.items()}
    return arrays((function(*args, **options), args, tuple(options.values())))


def is_real(array):
    return array.dtype.kind not in "iu"


@pytest.mark.parametrize("name", ROWS)
def test_an_op_computes_what_its_oracle_computes(xp, dtype, name):
    row, op_ = ROWS[name](np.random.default_rng(0), dtype), EVERY[name]
    ours = called(op_, row, xp.asarray)
    baseline = called(op_.reference, row, np.asarray)
    exact = called(op_.reference, row, lambda a: a.astype(np.float64) if is_real(a) else a)
    assert len(ours) == len(baseline) == len(exact)
    for own, base, true in zip(ours, baseline, exact, strict=True):
        assert own.dtype == base.dtype and own.shape == base.shape
        if is_real(own):
            check(own, base, true, dtype, name)
        else:
            np.testing.assert_array_equal(own, base)


# -- the decorator --------------------------------------------------------------------------------


class DeviceArray(np.ndarray):
    """What is taken for an array of CuPy."""


@pytest.fixture
def toy(monkeypatch):
    """An op that doubles: its oracle by NumPy, its kernel by noting that it was called."""
    oracle = types.ModuleType("gpt2cupy.ops.toy_reference")
    oracle.double = lambda x, times=1, *, out=None: ("numpy", x, times, out)
    monkeypatch.setitem(sys.modules, oracle.__name__, oracle)
    cupy = types.ModuleType("cupy")
    cupy.ndarray = DeviceArray
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(registry, "registered", {})
    monkeypatch.setattr(registry, "_device_types", set())

    def cost(x, out, rows):
        return Cost(moved(x) + written(out, x.size, x.dtype), rows * x.size)

    @op(reference="toy_reference.double", cost=cost)
    def double(x, times=1, *, out=None):
        """Twice."""
        return ("kernel", x, times, out)

    return double


def test_the_first_argument_says_where(toy):
    x = np.zeros(2)
    device = x.view(DeviceArray)
    assert toy(x, 3)[::2] == ("numpy", 3)
    assert toy(x=x)[0] == "numpy" and toy(1.0)[0] == "numpy"
    assert toy(device)[0] == toy(x=device)[0] == toy(device, out=x)[0] == "kernel"
    assert toy(types.SimpleNamespace(values=device))[0] == "kernel"
    assert toy.reference(device)[0] == "numpy"
    assert toy.__name__ == "double" and toy.__doc__ == "Twice."
    assert str(inspect.signature(toy)) == "(x, times=1, *, out=None)"
    assert registry.registered == {"double": toy}


def test_a_cost_takes_what_it_names(toy):
    x = np.zeros(2, np.float32)
    assert toy.cost(x, rows=5) == Cost(16, 10)
    assert toy.cost(x=x, times=9, out=np.zeros(3, np.float32), rows=1) == Cost(20, 2)
    assert toy.cost.extras == {"rows"}
    with pytest.raises(TypeError, match="rows"):
        toy.cost(x)
    with pytest.raises(TypeError, match="nothing"):
        toy.cost(x, nothing=1, rows=1)
    assert not ops.top_logprobs.cost.known
    with pytest.raises(LookupError, match=r"ops\.top_logprobs does not say"):
        ops.top_logprobs.cost(x, 1, 1)


def test_an_oracle_is_imported_when_it_is_needed():
    @op(reference="no_such_module.function")
    def lazy(x):
        return x

    del registry.registered["lazy"]
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        lazy(np.zeros(1))


def test_an_observer_sees_the_outermost_ops_of_its_thread(toy):
    seen, x = [], np.zeros(2)

    @op(reference=None)
    def outer(x):
        return toy(x)

    def around(op_, args, options):
        seen.append((op_.__name__, len(args), options))
        return ("seen", *op_(*args, **options))

    with registry.observed(around):
        assert outer(x)[:2] == ("seen", "numpy")
        assert toy(x, out=None)[0] == "seen"
        other = threading.Thread(target=toy, args=(x,))
        other.start()
        other.join()
        with registry.observed(lambda op_, *_: op_.__name__):
            assert toy(x) == "double"
        assert toy(x)[0] == "seen"
    assert seen == [("outer", 1, {}), ("double", 1, {"out": None}), ("double", 1, {})]
    assert toy(x)[0] == "numpy" and registry._observers == {}


def test_observing_ends_by_an_error_too(toy):
    def fail(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), registry.observed(fail):
        toy(np.zeros(2))
    assert registry._observers == {} and toy(np.zeros(2))[0] == "numpy"


def test_what_is_checked_before_is_checked_on_both(toy):
    def check_rows(x, *, out=None):
        if len(x) != 2:
            raise ValueError("rows")

    @op(reference="toy_reference.double", check=check_rows)
    def checked(x, *, out=None):
        return ("kernel",)

    for kind in (np.ndarray, DeviceArray):
        with pytest.raises(ValueError, match="rows"):
            checked(np.zeros(3).view(kind))
        checked(np.zeros(2).view(kind))


@pytest.mark.parametrize("refused", [MemoryError("no room"), RuntimeError("cudaError700")])
def test_what_a_gpu_refuses_reaches_the_caller_as_it_was(toy, refused):
    """By its type ``device_errors`` tells a full GPU from a failed one."""

    @op(reference="toy_reference.double", takes="x: float64[N]", of_models=True)
    def of_models(x):
        raise refused

    for _ in range(2):
        with pytest.raises(type(refused)) as caught:
            of_models(np.zeros(2).view(DeviceArray))
        assert caught.value is refused
    # An argument that does not fit is still what is said.
    with pytest.raises(InputError, match=r"^x is "):
        of_models(np.zeros((2, 2)).view(DeviceArray))
