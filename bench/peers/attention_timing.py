"""Times attention beside PyTorch's on the same arrays; what bench/attention.py calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np
import torch
from op_timing import from_python, gpu_alone
from shared import Reader
from torch.nn.attention import SDPBackend, sdpa_kernel

from gpt2cupy import ops
from gpt2cupy import torch as ours_torch
from gpt2cupy.loading import resolve_dtype
from gpt2cupy.torch.launches import view
from gpt2cupy.validate.rule import Limit, one_ulp

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
NODES_US = 5e3  # of calls in a graph, about
COLD_BYTES = 512 << 20  # of arrays that no cache holds
EXACT_BYTES = 4 << 30  # of scores in float64 at a time
Call = Callable[[], Any]


def sdpa(q: Any, k: Any, v: Any, **options: Any) -> Any:
    """PyTorch's attention on tensors [batch, tokens, heads, channels]."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def materialised(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """The formula with its T x T matrix, as it is written in PyTorch."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill_(hidden, -torch.inf)
    return (torch.softmax(scores, -1) @ v).transpose(1, 2)


def exact(q: Any, k: Any, v: Any, causal: bool) -> Any:
    """In float64, some heads at a time."""
    heads = max(EXACT_BYTES // (8 * q.shape[0] * q.shape[1] * k.shape[1]), 1)
    share = q.shape[2] // k.shape[2]
    parts = []
    for h in range(0, q.shape[2], heads):
        of = slice(h, min(h + heads, q.shape[2]))
        kv = torch.arange(of.start, of.stop, device=q.device) // share
        parts.append(
            materialised(*(t.double() for t in (q[:, :, of], k[:, :, kv], v[:, :, kv])), causal)
        )
    return torch.cat(parts, 2)


def differences(found: Any, true: Any) -> dict[str, float]:
    """Errors of a result against float64."""
    apart = (found.double() - true).abs()
    return {
        "max_error": apart.max().item(),
        "rms_error": apart.square().mean().sqrt().item(),
        "mean_error": apart.mean().item(),
    }


def judged(found: Any, true: Any, baseline: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Errors of a result, and whether the rule admits them beside those of the baseline."""
    row = differences(found, true)
    kind = resolve_dtype(dtype, np.dtype(np.float32), "cuda")
    ulp = one_ulp(true.abs().max().item(), kind)
    limit = Limit(baseline["max_error"], baseline["rms_error"], ulp)
    return row | {"inside": limit.admits(row["max_error"], row["rms_error"])}


def timed(bind: Callable[[list[Any]], Call], sets: list[list[Any]], runs: int) -> dict[str, Any]:
    """Calls from Python, and the GPU alone on the same arrays and on others each time."""
    call = bind(sets[0])
    once = gpu_alone([call] * 2, 3, None)["p50_us"]
    nodes = int(max(2, min(200, NODES_US // once)))
    calls = [bind(sets[i % len(sets)]) for i in range(max(nodes, len(sets)))]
    return {
        "python": from_python(call, runs, max(2, nodes // 4)),
        "gpu_warm": gpu_alone([call] * nodes, runs, None),
        "gpu_cold": gpu_alone(calls, runs, None),
    }


def peak(call: Call) -> int:
    """Bytes that PyTorch's allocator had at most beside what there was before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _ours(tensors: list[Any], causal: bool) -> Call:
    out = torch.empty_like(tensors[0])
    arrays, result = [view(t) for t in tensors], view(out)

    def call() -> Any:
        ops.attention(*arrays, causal, out=result)
        return out

    return call


def sequences(args: Any) -> Iterator[dict[str, Any]]:
    """A row for each dtype, length, and causal or full."""
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream).use()
        for dtype, tokens, causal in itertools.product(args.dtype, args.tokens, (True, False)):
            yield _sequence(args, dtype, tokens, causal)


def _sequence(args: Any, dtype: str, tokens: int, causal: bool) -> dict[str, Any]:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    shape = (args.batch, tokens, args.heads, args.head_size)
    kind = getattr(torch, dtype)
    one = [torch.randn(shape, device="cuda").to(kind) for _ in "qkv"]
    size = 4 * one[0].nbytes
    sets = [one, *([t.clone() for t in one] for _ in range(min(COLD_BYTES // size, 15)))]
    pairs = tokens * (tokens + 1) // 2 if causal else tokens * tokens
    row: dict[str, Any] = {
        "kind": "sequence", "dtype": dtype, "tokens": tokens, "causal": causal,
        "batch": args.batch, "heads": args.heads, "head_size": args.head_size, "bytes": size,
        "flops": 4 * args.batch * args.heads * args.head_size * pairs, "sdpa": {},
    }  # fmt: skip
    true = exact(*one, causal)
    for name, backend in BACKENDS.items():

        def bind(tensors: list[Any], backend: Any = backend) -> Call:
            def call() -> Any:
                with sdpa_kernel(backend):
                    return sdpa(*tensors, is_causal=causal)

            return call

        try:
            found = bind(one)()
        except RuntimeError:
            continue  # it does not take this dtype
        row["sdpa"][name] = differences(found, true) | timed(bind, sets, args.runs)
    row["best"] = min(row["sdpa"], key=lambda name: row["sdpa"][name]["gpu_warm"]["p50_us"])
    best = row["sdpa"][row["best"]]
    for name, bind in (
        ("ours", lambda tensors: _ours(tensors, causal)),
        ("ours_torch", lambda tensors: lambda: ours_torch.attention(*tensors, causal)),
    ):
        row[name] = judged(bind(one)(), true, best, dtype)
        ways = timed(bind, sets, args.runs)
        row[name] |= ways if row[name]["inside"] else dict.fromkeys(ways)
    del sets, true
    row["memory"] = {
        "materialised": peak(lambda: materialised(*one, causal)) if _fits(row) else None,
        "ours": peak(lambda: ours_torch.attention(*one, causal)),
    }
    return row


def _fits(row: dict[str, Any]) -> bool:
    scores = row["batch"] * row["heads"] * row["tokens"] ** 2
    return bool(scores * 16 < torch.cuda.mem_get_info()[0])


def one_token(args: Any) -> Iterator[dict[str, Any]]:
    """A row for each dtype and cache."""
    reader = Reader()
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream).use()
        for dtype, cache in itertools.product(args.dtype, args.caches):
            yield _token(args, reader, dtype, cache)


def _token(args: Any, reader: Reader, dtype: str, cache: tuple[int, ...]) -> dict[str, Any]:
    torch.manual_seed(0)
    batch, room, heads, kv, size = cache
    kind = getattr(torch, dtype)
    both = torch.randn(2, batch, room, kv, size, device="cuda").to(kind)
    q = torch.randn(batch, heads, size, device="cuda").to(kind)
    lengths = torch.full((batch,), room, device="cuda", dtype=torch.int32)
    out = torch.empty_like(q)
    k, v = both
    arrays = [view(t) for t in (q, k, v, lengths)]
    result, memory = view(out), view(both.view(-1))

    def ours() -> Any:
        ops.decode_attention(*arrays, out=result)
        return out

    def theirs() -> Any:
        return sdpa(q[:, None], k, v, enable_gqa=heads != kv)[:, 0]

    true = exact(q[:, None], k, v, False)[:, 0]
    size = both.nbytes
    row: dict[str, Any] = {"kind": "token", "dtype": dtype, "cache": list(cache), "bytes": size}
    row["sdpa"] = differences(theirs(), true)
    row["ours"] = judged(ours(), true, row["sdpa"], dtype)
    for name, call in (("ours", ours), ("sdpa", theirs)):
        inside = row[name].get("inside", True)
        row[name]["gpu"] = gpu_alone([call] * 4, args.runs, None) if inside else None
    row["read"] = gpu_alone([lambda: reader.read(memory)] * 4, args.runs, None)
    return row
