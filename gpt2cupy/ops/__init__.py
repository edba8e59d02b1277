"""The array functions of a GPT-2: NumPy in -> reference.py, CuPy in -> the CUDA kernel.

A function's module is imported when the function is first used, so what was imported says what
was used (record.py).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cached_attention import attention_decode, attention_prefill
    from .gpt2.embedding import embedding, last_rows
    from .linear import bias_act, gemv, linear, norm_linear
    from .norm import add_layer_norm, layer_norm
    from .quantized import dequantize, quantize
    from .sampling import sample, target_logprobs, top_logprobs

_MODULES = {
    "add_layer_norm": "norm",
    "attention_decode": "cached_attention",
    "attention_prefill": "cached_attention",
    "bias_act": "linear",
    "dequantize": "quantized",
    "embedding": "gpt2.embedding",
    "gemv": "linear",
    "last_rows": "gpt2.embedding",
    "layer_norm": "norm",
    "linear": "linear",
    "norm_linear": "linear",
    "quantize": "quantized",
    "sample": "sampling",
    "target_logprobs": "sampling",
    "top_logprobs": "sampling",
}

__all__ = [
    "add_layer_norm",
    "attention_decode",
    "attention_prefill",
    "bias_act",
    "dequantize",
    "embedding",
    "gemv",
    "last_rows",
    "layer_norm",
    "linear",
    "norm_linear",
    "quantize",
    "sample",
    "target_logprobs",
    "top_logprobs",
]


class _Lazy(ModuleType):
    """A module whose functions keep their names, also from modules that are named like them.

    The import of ``ops.linear`` sets the attribute of that name, which is a function's.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = function  # the next access finds it without this
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


sys.modules[__name__].__class__ = _Lazy
