"""What somebody might pass in place of an argument, and what may come of it."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from gpt2cupy.errors import Gpt2CupyError

ODD: list[Any] = [
    None, True, -1, 0, 1.5, math.nan, 2**64, "", "x", "\ud800", b"x", (), [3], [[3]], ["\ud800"],
    {"a": 1}, {3: "x"}, np.array([3, 4]), np.array([[3], [4]]), np.array([]), np.array(3),
    np.array(["a", "b"]), np.float32(0.5), object(), iter([3]), lambda: 0, range(2),
]  # fmt: skip


def tried(call, *args, **options):
    """What a call gives, None if it raises an error of ours; any other error fails the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*without a temperature")
        try:
            return call(*args, **options)
        except Gpt2CupyError as error:
            assert len(str(error)) < 700 and error.where and error.remedy
            return None
