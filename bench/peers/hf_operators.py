"""Operators of Hugging Face's generate() under torch.profiler; profile_hf.py writes them down."""

from __future__ import annotations

import time
from typing import Any

import torch

# In the names of kernels that multiply matrices.
MATRIX_WORDS = ("gemm", "gemv", "cutlass", "xmma", "splitk", "nvjet", "cublas")
Row = dict[str, Any]


@torch.inference_mode()
def operators(model: Any, ids: torch.Tensor, new_tokens: int) -> Row:
    """The operator table of generate() under torch.profiler."""
    on_gpu = ids.device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)

    def generate(count: int) -> None:
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
        if on_gpu:
            torch.cuda.synchronize()

    generate(new_tokens)
    with torch.profiler.profile(activities=kinds) as profiler:
        start = time.perf_counter()
        generate(new_tokens)
        wall_us = (time.perf_counter() - start) * 1e6
    averages = profiler.key_averages()
    cpu_us = sum(each.self_cpu_time_total for each in averages)
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    cuda_us = sum(e.time_range.elapsed_us() for e in kernels)
    table = [operator(each, cpu_us, cuda_us, on_gpu) for each in averages]
    table.sort(key=lambda row: -(row["self_cuda_ms"] or 0) if on_gpu else -row["self_cpu_ms"])
    result: Row = {
        "new_tokens": new_tokens,
        "wall_ms": wall_us / 1e3,
        "self_cpu_total_ms": cpu_us / 1e3,
        "self_cuda_total_ms": cuda_us / 1e3 if on_gpu else None,
        "matrix_percent": None,
        "idle_percent": None,
        "rows": table,
    }
    if on_gpu and cuda_us:
        products = [e for e in kernels if any(word in e.name.lower() for word in MATRIX_WORDS)]
        share = sum(e.time_range.elapsed_us() for e in products) / cuda_us
        # One stream: kernels do not overlap.
        result |= {"matrix_percent": 100 * share, "idle_percent": 100 * (1 - cuda_us / wall_us)}
    return result


def operator(each: Any, cpu_us: float, cuda_us: float, on_gpu: bool) -> Row:
    """One row with all the columns; those of CUDA are None on the CPU."""
    cuda: Row = dict.fromkeys(("self_cuda_ms", "self_cuda_percent", "cuda_total_ms", "cuda_avg_us"))
    if on_gpu:
        own, total = each.self_device_time_total, each.device_time_total
        cuda = {
            "self_cuda_ms": own / 1e3,
            "self_cuda_percent": 100 * own / cuda_us if cuda_us else 0.0,
            "cuda_total_ms": total / 1e3,
            "cuda_avg_us": total / each.count,
        }
    return {
        "name": each.key,
        "self_cpu_percent": 100 * each.self_cpu_time_total / cpu_us,
        "self_cpu_ms": each.self_cpu_time_total / 1e3,
        "cpu_total_percent": 100 * each.cpu_time_total / cpu_us,
        "cpu_total_ms": each.cpu_time_total / 1e3,
        "cpu_avg_us": each.cpu_time_total / each.count,
        **cuda,
        "calls": each.count,
    }
