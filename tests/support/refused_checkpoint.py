"""What tests of checkpoints that are wrong share."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt2cupy import checkpoint
from gpt2cupy.errors import CheckpointError, Gpt2CupyError

SHARD = "model-00001-of-00002.safetensors"
MEMORY = 4 << 20  # bytes that reading may take, whatever the file


def refused(path: Path, kind: type[Gpt2CupyError] = CheckpointError) -> Gpt2CupyError:
    with pytest.raises(kind) as caught:
        for _ in checkpoint.open(path).tensors(finite=True):
            pass
    error = caught.value
    assert error.where and error.remedy
    # The process can go on.
    assert checkpoint.open("shakespeare").config.n_layer == 6
    return error
