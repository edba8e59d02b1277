"""Hugging Face transformers with a static cache, its forward pass compiled by PyTorch.

generate() compiles by itself when the cache is static and the device is a GPU; the mode is
named here. On the CPU it runs uncompiled, which tests the script and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from hf_eager import generating, load
from interface import Job, Run, serve
from transformers import CompileConfig


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    torch._dynamo.reset()
    model = load(job)
    options: dict[str, Any] = {"cache_implementation": "static"}
    on_gpu = job["device"] != "cpu"
    if on_gpu:
        options["compile_config"] = CompileConfig(mode="reduce-overhead")
    mode = "reduce-overhead" if on_gpu else "none"
    return generating(model, job, **options), {"compiled": mode, "cache": "static"}


if __name__ == "__main__":
    serve(("torch", "transformers"), prepare)
