"""The checkpoint that `make parity MODEL=` names: found, read for transformers, recognised."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2cupy import GPT2Config
from gpt2cupy.checkpoint import Checkpoint
from gpt2cupy.checkpoint.resolve import ALIASES, EMBEDDED

VARIABLE = "GPT2CUPY_PARITY_MODEL"
# The beginning of GPT-2 124M's embedding, as every form of the checkpoint has it.
GPT2_WTE = (-0.1101, -0.0393, 0.0331)


@dataclass(frozen=True)
class Source:
    """A checkpoint under the name that gpt2cupy takes, and where its tokenizer lies."""

    name: str
    tokenizer: str | None = None

    @classmethod
    def given(cls) -> Source | None:
        """From the environment; llm.c's tokenizer is looked for beside its model."""
        name = os.environ.get(VARIABLE)
        if not name:
            return None
        beside = Path(name).parent / "gpt2_tokenizer.bin"
        return cls(name, str(beside) if name.endswith(".bin") else None)

    @classmethod
    def cached(cls) -> Source | None:
        """GPT-2 124M, if the hub's cache has it whole; asks no network."""
        from huggingface_hub import try_to_load_from_cache

        wanted = ("config.json", "model.safetensors", "vocab.json", "merges.txt")
        found = [try_to_load_from_cache(ALIASES["gpt2"], file) for file in wanted]
        if not all(isinstance(path, str) for path in found):
            return None
        return cls(str(Path(found[0]).parent))

    @property
    def is_llmc(self) -> bool:
        return self.name.endswith(".bin")

    @property
    def their_name(self) -> str:
        """What transformers calls it: a folder or a hub id."""
        return str(EMBEDDED.get(self.name) or ALIASES.get(self.name, self.name))

    def theirs(self, load: Any) -> Any:
        """GPT2LMHeadModel of transformers, which knows no file of llm.c."""
        if self.is_llmc:
            return read_llmc(Path(self.name))
        return load(self.their_name)


def read_llmc(path: Path) -> Any:
    """GPT2LMHeadModel from an llm.c file: its format as llm.c's own writer has it, read again."""
    import torch
    import transformers

    header = np.fromfile(path, "<i4", 256)
    version, context, vocab, layers, heads, c, padded = header[1:8].tolist()
    dtype = {3: np.float32, 5: ml_dtypes.bfloat16}[version]
    values = torch.from_numpy(np.fromfile(path, dtype, offset=1024).astype(np.float32))
    config = transformers.GPT2Config(
        vocab_size=vocab, n_positions=context, n_layer=layers, n_head=heads, n_embd=c
    )
    model = transformers.GPT2LMHeadModel._from_config(config, attn_implementation="eager")
    state = {}
    place = 0

    def take(*shape: int) -> Any:
        nonlocal place
        size = int(np.prod(shape))
        place += size
        return values[place - size : place].reshape(shape)

    state["wte.weight"] = take(padded, c)[:vocab]
    state["wpe.weight"] = take(context, c)
    shapes = {
        "ln_1.weight": (c,), "ln_1.bias": (c,),
        "attn.c_attn.weight": (3 * c, c), "attn.c_attn.bias": (3 * c,),
        "attn.c_proj.weight": (c, c), "attn.c_proj.bias": (c,),
        "ln_2.weight": (c,), "ln_2.bias": (c,),
        "mlp.c_fc.weight": (4 * c, c), "mlp.c_fc.bias": (4 * c,),
        "mlp.c_proj.weight": (c, 4 * c), "mlp.c_proj.bias": (c,),
    }  # fmt: skip
    for name, shape in shapes.items():
        for layer, array in enumerate(take(layers, *shape)):
            # Conv1D is [in, out].
            state[f"h.{layer}.{name}"] = array.T.contiguous() if len(shape) == 2 else array
    state["ln_f.weight"], state["ln_f.bias"] = take(c), take(c)
    assert place == len(values), "the file is larger than its tensors"
    model.transformer.load_state_dict(state)
    return model.eval()


def is_gpt2_124m(found: Checkpoint) -> bool:
    """Whether these are OpenAI's weights of 124M parameters, from whatever file."""
    if found.config != GPT2Config.from_name("gpt2"):
        return False
    wte = next(array for name, _, array in found.tensors() if name == "wte")
    return np.allclose(wte[0, :3].astype(np.float32), GPT2_WTE, atol=1e-3)
