"""The array functions of a GPT-2: NumPy in -> reference.py, CuPy in -> the CUDA kernel."""

from .cached_attention import attention_decode, attention_prefill
from .gpt2.embedding import embedding, last_rows
from .linear import bias_act, gemv, linear, norm_linear
from .norm import add_layer_norm, layer_norm
from .quantized import dequantize, quantize
from .sampling import sample, target_logprobs, top_logprobs
from .shift import shifted_bias

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
    "shifted_bias",
    "target_logprobs",
    "top_logprobs",
]
