"""The NumPy engine's products: few rows by stacks of small matrices, in several threads."""

from __future__ import annotations

import os
import threading
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2cupy.ops import reference_product
from gpt2cupy.ops.reference_product import product

rng = np.random.default_rng(0)
EPS = np.finfo(np.float32).eps


def matrices(rows, outputs, size):
    x = rng.standard_normal((rows, size)).astype(np.float32)
    return x, rng.standard_normal((outputs, size)).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(0, 20), outputs=st.integers(0, 700), size=st.sampled_from([1, 129, 768, 1024])
)
def test_any_shape(rows, outputs, size):
    x, weight = matrices(rows, outputs, size)
    exact = x.astype(np.float64) @ weight.astype(np.float64).T
    # No sum of so many products errs by more, in whatever order it is made.
    bound = size * EPS * (abs(x).astype(np.float64) @ abs(weight).astype(np.float64).T)
    assert (abs(product(x, weight) - exact) <= bound).all()


@pytest.fixture
def strips(monkeypatch):
    """Which outputs each thread made."""
    made = []
    real = reference_product._strip

    def strip(x, weight, y, start, end, outputs, settings):
        made.append((start, end, threading.current_thread()))
        real(x, weight, y, start, end, outputs, settings)

    monkeypatch.setattr(reference_product, "_strip", strip)
    return made


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_bits_do_not_follow_the_number_of_threads(monkeypatch, strips, threads):
    x, weight = matrices(5, 1001, 768)
    alone = product(x, weight)
    strips.clear()
    monkeypatch.setattr(reference_product, "threads", lambda: threads)
    assert product(x, weight).tobytes() == alone.tobytes()
    assert len(strips) == threads
    assert sorted(each[:2] for each in strips)[0][0] == 0
    edges = sorted(each[:2] for each in strips)
    assert [end for _, end in edges] == [start for start, _ in edges[1:]] + [1001]


def test_weights_that_are_part_of_others():
    x, weight = matrices(8, 600, 1024)
    wide = np.zeros((1200, 2048), np.float32)
    wide[::2, :1024] = weight
    assert product(x, wide[::2, :1024]).tobytes() == product(x, weight).tobytes()


def test_an_error_of_another_thread_is_raised(monkeypatch):
    monkeypatch.setattr(reference_product, "threads", lambda: 2)
    real = reference_product._strip

    def strip(x, weight, y, start, end, outputs, settings):
        if start:
            raise MemoryError("no room")
        real(x, weight, y, start, end, outputs, settings)

    monkeypatch.setattr(reference_product, "_strip", strip)
    with pytest.raises(MemoryError, match="no room"):
        product(*matrices(4, 500, 768))


def test_what_overflows_warns_nowhere_where_that_is_switched_off(monkeypatch):
    monkeypatch.setattr(reference_product, "threads", lambda: 2)
    x, weight = matrices(4, 500, 768)
    weight[:] = 3e38
    with warnings.catch_warnings(), np.errstate(over="ignore", invalid="ignore"):
        warnings.simplefilter("error")
        assert not np.isfinite(product(x, weight)).any()
    with pytest.warns(RuntimeWarning, match="in matmul"):
        product(x, weight)


def test_in_the_child_of_a_fork(monkeypatch):
    monkeypatch.setattr(reference_product, "threads", lambda: 2)
    x, weight = matrices(4, 500, 768)
    expected = product(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if product(x, weight).tobytes() == expected.tobytes() else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"OPENBLAS_NUM_THREADS": "1"}, 1),
        ({"OMP_NUM_THREADS": "1"}, 1),
        ({"OPENBLAS_NUM_THREADS": "2", "OMP_NUM_THREADS": "1"}, 2),
        ({"OPENBLAS_NUM_THREADS": "0"}, 4),
        ({"OPENBLAS_NUM_THREADS": "many"}, 4),
        ({"OPENBLAS_NUM_THREADS": "64"}, 4),
        ({}, 4),
    ],
)
def test_threads_are_those_of_blas(monkeypatch, variables, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(4))
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert reference_product.threads.__wrapped__() == count
