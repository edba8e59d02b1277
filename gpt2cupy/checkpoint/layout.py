"""The one table of names: what files call GPT-2's tensors, and where they go in ``Weights``."""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..config import GPT2Config
from ..weights import weight_shapes

# Hugging Face name -> (our name, stored as [in, out] by Conv1D)
LAYER = {
    "ln_1.weight": ("ln1_w", False),
    "ln_1.bias": ("ln1_b", False),
    "attn.c_attn.weight": ("qkv_w", True),
    "attn.c_attn.bias": ("qkv_b", False),
    "attn.c_proj.weight": ("proj_w", True),
    "attn.c_proj.bias": ("proj_b", False),
    "ln_2.weight": ("ln2_w", False),
    "ln_2.bias": ("ln2_b", False),
    "mlp.c_fc.weight": ("fc_w", True),
    "mlp.c_fc.bias": ("fc_b", False),
    "mlp.c_proj.weight": ("out_w", True),
    "mlp.c_proj.bias": ("out_b", False),
}
WHOLE = {
    "wte.weight": "wte",
    "wpe.weight": "wpe",
    "ln_f.weight": "lnf_w",
    "ln_f.bias": "lnf_b",
}
HEAD = ("lm_head.weight", "lm_head")  # never under the prefix "transformer."
PREFIX = "transformer."

# What wrappers leave before every key: torch.compile, DataParallel, PEFT, trainers.
WRAPPERS = ("_orig_mod.", "module.", "base_model.model.", "base_model.", "model.")

# Buffers of the causal mask, which older versions stored: not worth a word.
BUFFERS = re.compile(r"h\.\d+\.attn\.(?:masked_)?bias")
# What else does not enter the logits: heads for other tasks, value heads, counted positions.
OTHER_TASKS = re.compile(
    r"(?:v_head|value_head|multiple_choice_head|summary|score|classifier|qa_outputs)\..*"
    r"|(?:.*\.)?position_ids"
)

# llm.c: no names, this order, every kind with its layers one after the other, rows [out, in].
LLMC_ORDER = (
    *("wte", "wpe"),
    *("ln1_w", "ln1_b", "qkv_w", "qkv_b", "proj_w", "proj_b"),
    *("ln2_w", "ln2_b", "fc_w", "fc_b", "out_w", "out_b"),
    *("lnf_w", "lnf_b"),
)


def tensor_shape(config: GPT2Config, name: str) -> tuple[int, ...]:
    """Shape of one tensor (of one layer) in rows [out, in], the vocabulary without padding."""
    if name in ("wte", "lm_head"):
        return config.vocab_size, config.n_embd
    shape = weight_shapes(config)[name]
    return shape[1:] if is_stacked(name) else shape


def is_stacked(name: str) -> bool:
    """Whether each layer has a tensor of this name."""
    return name not in ("wte", "wpe", "lnf_w", "lnf_b", "lm_head")


def huggingface_keys(config: GPT2Config) -> Iterator[tuple[str, str, int | None, bool]]:
    """(key without prefix, our name, layer, stored as [in, out]) of every tensor of the model."""
    for key, name in WHOLE.items():
        yield key, name, None, False
    for layer in range(config.n_layer):
        for key, (name, transposed) in LAYER.items():
            yield f"h.{layer}.{key}", name, layer, transposed
    if not config.tie_word_embeddings:
        yield *HEAD, None, False
