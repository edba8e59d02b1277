"""``gpt2cupy validate``: whether the numbers are right, and where they first are not.

:func:`validate` compares the cached step with the whole forward, every decode
path with eager, and all of them with float64; :mod:`huggingface` compares with
transformers. A result passes by the error rule (:mod:`rule`).
"""

from .check import continued, random_ids, validate
from .compare import Comparison, Step
from .rule import Limit

__all__ = ["Comparison", "Limit", "Step", "continued", "random_ids", "validate"]
