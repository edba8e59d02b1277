"""Text to token ids and back, from the files of a checkpoint."""

from .no_tokenizer import NoTokenizer
from .tokenizer import StreamDecoder, Tokenizer
from .vocabulary import BYTE_SYMBOLS, END_OF_TEXT

__all__ = ["BYTE_SYMBOLS", "END_OF_TEXT", "NoTokenizer", "StreamDecoder", "Tokenizer"]
