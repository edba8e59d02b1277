"""Beginnings of cache slots, copied to others."""

from __future__ import annotations

import numpy as np
import pytest
from builders import host
from op_checks import draw, on

from gpt2cupy import ops


@pytest.mark.parametrize("head_size", [64, 19])
def test_beginnings_are_copied(xp, dtype, head_size):
    rng = np.random.default_rng(0)
    shape = 2, 5, 3, 130, head_size
    k, v = draw(rng, shape, dtype), draw(rng, shape, dtype)
    copies = np.array([[0, 0, 3], [2, 1, 4], [1, 130, 77]], np.int32)
    expected = []
    for cache in (k, v):
        cache = cache.copy()
        for source, target, count in copies.T:
            cache[:, target, :, :count] = cache[:, source, :, :count]
        expected.append(cache)
    ours = on(xp, k, v)
    assert ops.copy_slots(*ours, *on(xp, copies)[0]) is None
    for found, wanted in zip(ours, expected, strict=True):
        np.testing.assert_array_equal(host(found).view(np.uint8), wanted.view(np.uint8))
