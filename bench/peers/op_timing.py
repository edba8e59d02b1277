"""Times ops beside PyTorch on the same arrays; what bench/ops.py calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np
import torch
from op_cases import CASES, Case

from gpt2cupy.loading import resolve_dtype
from gpt2cupy.torch.launches import view
from gpt2cupy.validate.rule import Limit, errors

NODES = 200  # of the graph that times the GPU alone
CHECKED = 256  # rows whose errors are taken
DRAWN = 1024  # rows of random numbers, which are repeated where there are more
WAYS = ("python", "graph", "gpu_warm", "gpu_cold")  # of calling
COLD_BYTES = 2 << 30  # at most, of the arrays that its nodes read
# For so long a graph is replayed before it is timed. PyTorch frees what it held when a graph is
# captured, and the first milliseconds after gigabytes were freed were seen to be a seventh slower.
WARM_SECONDS = 0.1


def spread(seconds: list[float]) -> dict[str, float]:
    us = np.asarray(seconds) * 1e6
    p50, p95, p99 = np.percentile(us, [50, 95, 99])
    return {"p50_us": p50, "p95_us": p95, "p99_us": p99, "mean_us": us.mean(), "runs": len(us)}


def from_python(call: Callable[[], Any], runs: int, inner: int = 50) -> dict[str, float]:
    """Wall-clock time of a call, one after the other until the GPU is done."""
    return called_in_turn({"": call}, runs, inner)[""]


def called_in_turn(
    calls: dict[str, Callable[[], Any]], runs: int, inner: int = 50
) -> dict[str, dict[str, float]]:
    """Wall-clock time of each call, the runs of all in turn.

    A processor that is slow for some seconds is so for all of them, and their ratios stand.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(runs + 3):
        for name, call in calls.items():
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            torch.cuda.synchronize()
            if number >= 3:
                seconds[name].append((time.perf_counter() - start) / inner)
    return {name: spread(each) for name, each in seconds.items()}


def captured(calls: list[Callable[[], Any]]) -> Any:
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    graph.replay()
    return graph


def gpu_alone(
    calls: list[Callable[[], Any]], runs: int, flush: Callable[[], Any] | None
) -> dict[str, float]:
    """Time of a node of a graph of these calls, between events."""
    graph = captured(calls)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    end, seconds = time.perf_counter() + WARM_SECONDS, []
    while time.perf_counter() < end:
        graph.replay()
        torch.cuda.synchronize()
    for number in range(runs + 2):
        if flush:
            flush()
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        if number >= 2:
            seconds.append(first.elapsed_time(last) / 1e3 / len(calls))
    return spread(seconds)


class Side:
    """One way to compute a case: how it is called on a set of arrays."""

    def __init__(self, name: str, bound: Callable[[list[Any]], Callable[[], Any]]) -> None:
        self.name, self.bound = name, bound


def sides(case: Case) -> list[Side]:
    compiled = torch.compile(case.torch, dynamic=False)

    def ours(tensors: list[Any]) -> Callable[[], Any]:
        out = [
            torch.empty(shape, dtype=_torch_dtype(kind, tensors[0]), device="cuda")
            for shape, kind in case.outputs(*tensors)
        ]
        arrays, results = [view(t) for t in tensors], [view(t) for t in out]

        def call() -> Any:
            case.ours(arrays, results)
            return out if len(out) > 1 and not case.exact_result else out[0]

        return call

    def plain(function: Callable[..., Any]) -> Callable[[list[Any]], Callable[[], Any]]:
        return lambda tensors: lambda: function(*tensors)

    cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream).use()
    return [
        Side("ours", ours),
        Side("ours_torch", plain(case.ours_torch)),
        Side("eager", plain(case.torch)),
        Side("compiled", plain(compiled)),
    ]


def _torch_dtype(kind: Any, x: Any) -> Any:
    return x.dtype if kind is None else {np.int32: torch.int32, np.float32: torch.float32}[kind]


def made(case: Case, shape: tuple[int, ...], kind: Any, *, tables: bool) -> list[Any]:
    """Inputs on the GPU; of many rows some are drawn, and then repeated."""
    few = shape[0] > DRAWN and not tables
    host = case.inputs(np.random.default_rng(0), (DRAWN, *shape[1:]) if few else shape)
    tensors = [torch.tensor(array, device="cuda") for array in host]
    tensors = [t if tables and i else t.to(kind) for i, t in enumerate(tensors)]
    if not few:
        return tensors
    times = -(-shape[0] // DRAWN)
    return [
        t.repeat(times, *[1] * (t.dim() - 1))[: shape[0]] if len(t) == DRAWN and t.dim() > 1 else t
        for t in tensors
    ]


def ways(
    side: Side, sets: list[list[Any]], runs: int, flush: Callable[[], Any] | None
) -> dict[str, Any]:
    """A side's times on the GPU alone."""
    return {
        "gpu_warm": gpu_alone([side.bound(sets[0])] * len(sets), runs, None),
        "gpu_cold": gpu_alone([side.bound(each) for each in sets], runs, flush),
    }


def host_ways(sides: list[Side], one: list[Any], size: int, runs: int) -> dict[str, dict[str, Any]]:
    """Times of each side's calls from Python, and of a graph of one of them."""
    inner = max(4, min(50, (1 << 31) // size))
    calls = {side.name: side.bound(one) for side in sides}
    graphs = {name: captured([call]).replay for name, call in calls.items()}
    python, graph = (called_in_turn(each, runs, inner) for each in (calls, graphs))
    return {name: {"python": python[name], "graph": graph[name]} for name in calls}


def measure(name: str, shape: tuple[int, ...], dtype: str, args: Any) -> dict[str, Any]:
    case = CASES[name]
    torch._dynamo.reset()
    # The tables of rope stay in float32.
    one = made(case, shape, getattr(torch, dtype), tables=name == "rope")
    inputs = sum(t.numel() * t.element_size() for t in one)
    written = case.outputs(*one)[: 1 if case.exact_result else None]
    size = inputs + sum(int(np.prod(s)) * (4 if k else one[0].element_size()) for s, k in written)
    nodes = int(max(2, min(NODES, COLD_BYTES // (2 * size))))
    sets = [one, *([t.clone() for t in one] for _ in range(nodes - 1))]
    # Of what all nodes share nothing may stay in the cache.
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    buffer = torch.empty(2 * cache, dtype=torch.uint8, device="cuda")
    flush = buffer.zero_ if nodes * size < 8 * cache else None
    row: dict[str, Any] = {"op": name, "shape": list(shape), "dtype": dtype, "bytes": size}
    row["copy"] = copied(size, nodes, args.runs, flush)

    # Rows are alike: the errors are those of the first.
    part = [t[:CHECKED] if t.dim() > 1 and len(t) == len(one[0]) else t for t in one]
    if case.exact_result:
        exact = case.exact(*map(_host, part))
    else:
        exact = first(case.exact(*(t.double().cpu().numpy() for t in part)))
    found, timed = {}, []
    for side in sides(case):
        try:
            found[side.name] = _host(first(side.bound(one)())[:CHECKED])
            row[side.name] = ways(side, sets, args.runs, flush)
            timed.append(side)
        except Exception as error:
            if side.name != "compiled":
                raise
            # PyTorch's compiler fails on some cases; what it said stands in the record.
            said = f"{type(error).__name__}: {error}".splitlines()[0]
            row[side.name] = dict.fromkeys(WAYS) | {"failed": said}
    for name, times in host_ways(timed, one, size, args.runs).items():
        row[name] |= times
    judge(row, case, found, exact, dtype)
    return row


def first(result: Any) -> Any:
    return result[0] if isinstance(result, (tuple, list)) else result


def _host(tensor: Any) -> np.ndarray:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()


def copied(size: int, nodes: int, runs: int, flush: Callable[[], Any] | None) -> dict[str, Any]:
    """A copy that reads and writes as many bytes as the op, cold: the driver's or a kernel's.

    The driver's is the faster one of megabytes, and slower by half of hundreds of them.
    """
    count = max(size // 8, 4)
    pairs = [torch.rand((2, count), device="cuda") for _ in range(nodes)]
    by = {
        "driver": [lambda p=p: p[1].copy_(p[0]) for p in pairs],
        "kernel": [lambda p=p: torch.neg(p[0], out=p[1]) for p in pairs],
    }
    timed = {name: gpu_alone(calls, runs, flush) for name, calls in by.items()}
    best = min(timed, key=lambda name: timed[name]["p50_us"])
    return timed[best] | {"by": best}


def judge(
    row: dict[str, Any], case: Case, found: dict[str, np.ndarray], exact: np.ndarray, dtype: str
) -> None:
    """Errors of each side; what is outside the rule keeps no speed."""
    for name in ("ours", "ours_torch", "eager"):
        if case.exact_result:
            row[name]["right"] = name == "eager" or bool((found[name] == exact).all())
            inside = row[name]["right"]
        else:
            largest, rms = errors(found[name], exact)
            mean = float(np.abs(found[name] - exact).mean())
            row[name] |= {"max_error": largest, "rms_error": rms, "mean_error": mean}
            held = resolve_dtype(dtype, np.dtype(np.float32), "cuda")
            inside = name == "eager" or Limit.of(found["eager"], exact, held).admits(largest, rms)
        if not inside:
            row[name] |= dict.fromkeys(WAYS)


def all_ops(cases: list[tuple[str, tuple[int, ...], str]], args: Any) -> Iterator[dict[str, Any]]:
    """A row for each (op, shape, dtype), on a stream of its own."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
        for case in cases:
            yield measure(*case, args)
            torch.cuda.empty_cache()
