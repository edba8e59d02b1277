"""The decode step: the state it works on, and the ways to run it."""

from .eager import EagerDecoder
from .state import DecodeState

__all__ = ["DecodeState", "EagerDecoder"]
