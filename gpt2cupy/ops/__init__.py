"""Array functions of transformers: NumPy in -> reference.py, CuPy in -> the CUDA kernel.

A function's module is imported when the function is first used, so what was imported says what
was used (record.py).
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .activation import bias_gelu, gelu, silu_mul
    from .attention import attention
    from .cached_attention import attention_decode, attention_prefill
    from .decode_attention import decode_attention
    from .drafts import accept_drafts, propose_drafts, store_kv
    from .epilogue import bias_act
    from .ffn import ffn
    from .gpt2.embedding import embedding, last_rows
    from .linear import gemv, linear
    from .lookup import lookup
    from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
    from .norm_backward import layer_norm_backward, rms_norm_backward
    from .norm_linear import norm_linear
    from .quantized import dequantize, quantize
    from .rope import rope, rope_tables
    from .sampling import sample, sample_logits, target_logprobs, top_logprobs
    from .shift import shifted_bias
    from .slots import copy_slots
    from .softmax import softmax

_MODULES = {
    "accept_drafts": "drafts",
    "add_layer_norm": "norm",
    "add_rms_norm": "norm",
    "attention": "attention",
    "attention_decode": "cached_attention",
    "attention_prefill": "cached_attention",
    "bias_act": "epilogue",
    "bias_gelu": "activation",
    "copy_slots": "slots",
    "decode_attention": "decode_attention",
    "dequantize": "quantized",
    "embedding": "gpt2.embedding",
    "ffn": "ffn",
    "gelu": "activation",
    "gemv": "linear",
    "last_rows": "gpt2.embedding",
    "layer_norm": "norm",
    "layer_norm_backward": "norm_backward",
    "linear": "linear",
    "lookup": "lookup",
    "norm_linear": "norm_linear",
    "propose_drafts": "drafts",
    "quantize": "quantized",
    "rms_norm": "norm",
    "rms_norm_backward": "norm_backward",
    "rope": "rope",
    "rope_tables": "rope",
    "sample": "sampling",
    "sample_logits": "sampling",
    "shifted_bias": "shift",
    "silu_mul": "activation",
    "softmax": "softmax",
    "store_kv": "drafts",
    "target_logprobs": "sampling",
    "top_logprobs": "sampling",
}

__all__ = [
    "accept_drafts",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "attention_decode",
    "attention_prefill",
    "bias_act",
    "bias_gelu",
    "copy_slots",
    "decode_attention",
    "dequantize",
    "embedding",
    "ffn",
    "gelu",
    "gemv",
    "last_rows",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "lookup",
    "norm_linear",
    "propose_drafts",
    "quantize",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "rope_tables",
    "sample",
    "sample_logits",
    "shifted_bias",
    "silu_mul",
    "softmax",
    "store_kv",
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
