"""The table of names: Hugging Face's GPT-2 tensors and where they go in Weights."""

from __future__ import annotations

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
