"""Live comparisons with transformers in float32 on the CPU."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gpt2cupy

EMBEDDED = Path(gpt2cupy.__file__).parent / "models" / "shakespeare"
VARIABLE = "GPT2CUPY_PARITY_MODEL"

# Threads that spin while they wait make torch many times slower on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


@pytest.fixture(scope="session")
def hugging_face() -> Callable[..., Any]:
    """Load a folder or hub id as GPT2LMHeadModel in float32."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    def load(name: str | Path, attention: str = "eager") -> Any:
        model = transformers.GPT2LMHeadModel.from_pretrained(name, attn_implementation=attention)
        return model.float().eval()

    return load


@pytest.fixture(scope="session")
def their_logits() -> Callable[[Any, Any], np.ndarray]:
    """Logits [B, T, V] of their model for ids [B, T]."""
    torch = pytest.importorskip("torch")

    def logits(model: Any, ids: Any) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.as_tensor(np.atleast_2d(ids))).logits.numpy()

    return logits


@pytest.fixture(scope="session")
def embedded_folder() -> Path:
    return EMBEDDED


@pytest.fixture(scope="session")
def embedded() -> Iterator[gpt2cupy.LanguageModel]:
    with gpt2cupy.load(device="cpu") as lm:
        yield lm


@pytest.fixture(scope="session")
def their_embedded(hugging_face: Callable[..., Any]) -> Any:
    return hugging_face(EMBEDDED)


@pytest.fixture(scope="session")
def chosen(hugging_face: Callable[..., Any]) -> Iterator[tuple[gpt2cupy.LanguageModel, Any]]:
    """The model that the environment names, as ours and theirs."""
    name = os.environ.get(VARIABLE)
    if not name:
        pytest.skip(f"{VARIABLE} names no model (a hub id or a folder)")
    with gpt2cupy.load(name, device="cpu") as lm:
        yield lm, hugging_face({"gpt2": "openai-community/gpt2"}.get(name, name))
