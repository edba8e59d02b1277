"""The ops on PyTorch's CUDA tensors: without a copy, on PyTorch's current stream.

    import gpt2cupy.torch as ours
    y = ours.rms_norm(x, weight)

Each function is an operator of ``torch.ops.gpt2cupy`` with a fake implementation, so that
``torch.compile`` and CUDA graphs take it. ``rms_norm`` and ``layer_norm`` can be
differentiated; where a gradient is asked of another, it raises. CuPy must be installed: it
compiles and launches the kernels. This is the only package that imports PyTorch.
"""

from __future__ import annotations

from .attention import Attention, attention, decode_attention
from .modules import FeedForward, LayerNorm, RMSNorm
from .norms import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .products import ffn, linear
from .rows import bias_gelu, gelu, lookup, rope, sample_logits, silu_mul, softmax

__all__ = [
    "Attention",
    "FeedForward",
    "LayerNorm",
    "RMSNorm",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "bias_gelu",
    "decode_attention",
    "ffn",
    "gelu",
    "layer_norm",
    "linear",
    "lookup",
    "rms_norm",
    "rope",
    "sample_logits",
    "silu_mul",
    "softmax",
]
