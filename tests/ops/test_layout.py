"""Tensors of a checkpoint on their way to the GPU: converted and transposed there."""

from __future__ import annotations

import numpy as np
import pytest
from error_rule import DTYPES

from gpt2cupy.errors import InputError
from gpt2cupy.ops.layout import Uploader

pytestmark = pytest.mark.gpu
# Within a tile of layout.cu, and over its edges.
SHAPES = [(5, 3), (33, 70)]


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("held", DTYPES)
def test_a_tensor_arrives_as_it_is_held(stored, held):
    import cupy

    uploader = Uploader()
    for shape in SHAPES:
        drawn = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for source in (drawn.astype(DTYPES[stored]), drawn.astype(DTYPES[stored]).T):
            target = cupy.zeros(source.shape, DTYPES[held])
            uploader.place(source, target)
            found, expected = target.get(), source.astype(np.float32).astype(DTYPES[held])
            np.testing.assert_array_equal(found.view(np.uint8), expected.copy().view(np.uint8))


def test_what_does_not_fit_its_place_is_refused():
    import cupy

    with pytest.raises(InputError, match=r"float64\[5, 3\]"):
        Uploader().place(np.zeros((5, 3)), cupy.zeros((5, 3), np.float32))
