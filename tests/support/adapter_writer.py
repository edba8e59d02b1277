"""LoRA adapters as PEFT writes them, written without PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from builders import TINY
from safetensors.numpy import save_file

C_ATTN = "base_model.model.transformer.h.1.attn.c_attn"
WIDTH = TINY.n_embd
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "base_model_name_or_path": "gpt2",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["c_attn"],
    "fan_in_fan_out": True,
    "bias": "none",
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
    "init_lora_weights": True,
    "use_dora": False,
    "layer_replication": None,
}


def factors(key: str = C_ATTN, rows: int = 3 * WIDTH, rank: int = 4) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(rank)
    return {
        f"{key}.lora_A.weight": rng.normal(size=(rank, WIDTH)).astype(np.float32),
        f"{key}.lora_B.weight": rng.normal(size=(rows, rank)).astype(np.float32),
    }


def write_adapter(folder: Path, tensors: dict | None = None, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder
