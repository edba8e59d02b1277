"""Running the GPU tests as an older chip would: ``pytest -m gpu --chip sm_75``.

The kernels are compiled to PTX of that architecture, which the driver translates for the GPU
that is there, and the package is told the limits of a small chip of that kind: so the branches
for chips without clusters, tensor cores or much shared memory run too.
"""

from __future__ import annotations

import os
import tempfile
from types import SimpleNamespace
from typing import NamedTuple

from gpt2cupy.ops.core import compiler, device, launch


class Chip(NamedTuple):
    """What such a chip has less of."""

    shared: int  # bytes of shared memory for a block
    sms: int


CHIPS = {"sm_75": Chip(64 << 10, 40), "sm_80": Chip(163 << 10, 40), "sm_86": Chip(99 << 10, 40)}


def pretend(name: str) -> None:
    """Make this process take its GPU for a ``name``."""
    chip = CHIPS[name]
    # PTX must not get among the cubins of a real chip of this kind. Workers share a folder.
    prefix = f"gpt2cupy-{name}-"
    if prefix not in os.environ.get("GPT2CUPY_CACHE_DIR", ""):
        os.environ["GPT2CUPY_CACHE_DIR"] = tempfile.mkdtemp(prefix=prefix)
    device.device_arch = launch.device_arch = lambda index: name
    device._sm_count = lambda index: chip.sms
    device._shared_limit = lambda index: chip.shared
    real, binding = compiler.compile_source, compiler.nvrtc()
    compiler.nvrtc = lambda: SimpleNamespace(**vars(binding) | {"getCUBIN": binding.getPTX})
    compiler.compile_source = lambda source, options: real(
        source, [option.replace("-arch=sm_", "-arch=compute_") for option in options]
    )
