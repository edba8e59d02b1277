"""What ops launch on a chip, without a GPU: ``python chosen_kernels.py ARCH [OP ...]``.

Arrays are NumPy's, taken for a GPU's as in launch_recorder.py. Runs the row of every op, or of
those named, in every dtype, and writes source, macros and entry of each kernel launched as a line
of JSON.
"""

from __future__ import annotations

import json
import sys

import launch_recorder
import numpy as np


def main(arch: str, *wanted: str) -> None:
    sys.modules["cupy"] = launch_recorder._cupy()
    from gpt2cupy.ops.core import blas, device, launch, tape

    chosen: set[str] = set()

    def function(device, kernel, elem, head_size, inner, shared):
        defines = kernel.defines(elem, head_size, inner)
        chosen.add(json.dumps([kernel.source, defines, kernel.entry], sort_keys=True))
        return lambda *args, **options: None

    device.cupy_packages = lambda: ("cupy",)
    device.device_arch = launch.device_arch = lambda index: arch
    device._sm_count = lambda index: 132
    device._shared_limit = lambda index: (64 if arch == "sm_75" else 99) << 10
    for module in list(sys.modules.values()):  # those that have taken it by name
        if getattr(module, "device_arch", None) is not None:
            module.device_arch = device.device_arch
    blas.gemv = blas.matmul = lambda *args, **options: None
    launch._function = launch._requested = function
    tape.Launch.by_driver = lambda self: None

    import op_rows
    from error_rule import DTYPES

    from gpt2cupy import ops

    def on_gpu(value):
        if isinstance(value, tuple):
            return tuple(map(on_gpu, value))
        return value.view(launch_recorder.Array) if isinstance(value, np.ndarray) else value

    for name, row in op_rows.ROWS.items():
        if wanted and name not in wanted:
            continue
        for dtype in map(np.dtype, DTYPES.values()):
            args, options = row(np.random.default_rng(0), dtype)
            options = {key: on_gpu(value) for key, value in options.items()}
            getattr(ops, name)(*on_gpu(tuple(args)), **options)
    print("\n".join(sorted(chosen)))


if __name__ == "__main__":
    main(*sys.argv[1:])
