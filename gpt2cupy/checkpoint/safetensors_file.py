"""safetensors files: checked by the library, mapped by us.

The library's reader copies every tensor; a mapped view lets the loader copy
each byte once, straight to where it stays.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError
from ..files import open_plain
from .entries import Entry
from .stored import unreadable

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# GPT-2 XL's header has 80 KB. Parsed, JSON takes several times its size.
_MAX_HEADER = 4 << 20


def read(path: Path) -> list[Entry]:
    """Every tensor of a file."""
    header, begin = _header(path)
    return [
        Entry(
            key,
            path,
            begin + value["data_offsets"][0],
            _DTYPES.get(value["dtype"], value["dtype"]),
            tuple(value["shape"]),
        )
        for key, value in header.items()
    ]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Entries of a file that the library found valid, and where its data begins."""
    try:
        with open_plain(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > _MAX_HEADER:
                raise ValueError(f"its header claims {size} bytes")
            header = json.loads(file.read(size))
        # Checks the header's form, and that the tensors fill the file without gap or overlap.
        with safe_open(path, framework="numpy"):
            pass
    except OSError as error:
        raise unreadable(path, error) from error
    except (SafetensorError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"not a valid safetensors file: {error}",
            where=str(path),
            remedy="It is damaged or incomplete; download or convert it again.",
        ) from error
    header.pop("__metadata__", None)
    return header, 8 + size
