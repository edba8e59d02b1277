"""The kernels that the sources have, read from their text."""

from __future__ import annotations

from gpt2cupy.ops.core import cuda_source
from gpt2cupy.ops.core.entries import entries


def kernel_entries() -> set[tuple[str, str]]:
    """(file, entry) of every extern "C" kernel."""
    return {(source, entry) for source in cuda_source.sources() for entry in entries(source)}
