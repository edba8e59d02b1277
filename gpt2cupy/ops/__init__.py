"""Array functions of transformers: NumPy in -> reference.py, CuPy in -> the CUDA kernel."""

from .activation import bias_gelu, gelu, silu_mul
from .attention import attention_decode, attention_prefill
from .embedding import embedding, last_rows, lookup
from .linear import bias_act, gemv, linear, norm_linear
from .norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .norm_backward import layer_norm_backward, rms_norm_backward
from .quantized import dequantize, quantize
from .rope import rope, rope_tables
from .sampling import sample, sample_logits, target_logprobs, top_logprobs
from .shift import shifted_bias
from .softmax import softmax

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "attention_decode",
    "attention_prefill",
    "bias_act",
    "bias_gelu",
    "dequantize",
    "embedding",
    "gelu",
    "gemv",
    "last_rows",
    "layer_norm",
    "layer_norm_backward",
    "linear",
    "lookup",
    "norm_linear",
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
    "target_logprobs",
    "top_logprobs",
]
