"""What users hold: LanguageModel, and load, which makes one of a checkpoint."""

from .language_model import LanguageModel
from .loader import load

__all__ = ["LanguageModel", "load"]
