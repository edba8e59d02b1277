"""GPT-2 inference from hand-written CUDA kernels on CuPy arrays, and on NumPy without a GPU.

Importing this loads no CuPy, touches no GPU and compiles nothing: the public
names are fetched when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .config import GPT2Config
    from .errors import Gpt2CupyError
    from .generation.text import Completion, Piece, Score
    from .lm import LanguageModel, load
    from .model import GPT2
    from .sampling import SamplingParams

_PUBLIC = {
    "Completion": "generation.text",
    "GPT2": "model",
    "GPT2Config": "config",
    "Gpt2CupyError": "errors",
    "LanguageModel": "lm",
    "Piece": "generation.text",
    "SamplingParams": "sampling",
    "Score": "generation.text",
    "load": "lm",
}

__all__ = [
    "GPT2",
    "Completion",
    "GPT2Config",
    "Gpt2CupyError",
    "LanguageModel",
    "Piece",
    "SamplingParams",
    "Score",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
