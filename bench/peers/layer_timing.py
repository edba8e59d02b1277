"""Times layers beside PyTorch on the same weights; what bench/layers.py calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
import torch
from layer_models import LAYERS, SHAPES, Shape, drawn, operations
from layer_peers import PEERS
from op_timing import CHECKED, COLD_BYTES, captured, from_python, gpu_alone, spread
from shared import Reader

from gpt2cupy.loading import resolve_dtype
from gpt2cupy.ops import rope_tables
from gpt2cupy.ops.core.blas import Queued
from gpt2cupy.ops.core.tape import load, recorded
from gpt2cupy.torch.launches import view
from gpt2cupy.validate.rule import Limit, errors

FEW = 64  # tokens up to which weights are read faster than multiplied
NODES = 24  # of a graph, at most
SECONDS = 0.02  # of a graph, about


def weights(layer: str, shape: Shape, tokens: int, kind: Any) -> dict[str, Any]:
    """Random weights on the GPU in a dtype; angles in float32."""
    # Large ones repeat some millions of numbers, which are drawn once.
    rng = np.random.default_rng(0)
    made = {}
    for name, size in LAYERS[layer][1](shape).items():
        rows = min(size[0], max(1, (1 << 22) // size[-1])) if len(size) == 2 else size[0]
        ((_, part),) = drawn({name: (rows, *size[1:])}, rng)
        tensor = torch.tensor(part, device="cuda")
        repeats = -(-size[0] // rows)
        made[name] = tensor.repeat((repeats, *(1 for _ in size[1:])))[: size[0]].to(kind)
    if layer == "llama":
        tables = rope_tables(tokens, shape.head_size)
        made |= {
            n: torch.tensor(t, device="cuda") for n, t in zip(("cos", "sin"), tables, strict=True)
        }
    return made


def ours_of(make: Any, shape: Shape, w: dict[str, Any], x: Any) -> Callable[[], Any]:
    """Our layer on tensors' memory; returns its output as a tensor."""
    arrays = {name: view(tensor) for name, tensor in w.items() if name not in ("cos", "sin")}
    given = view(x)
    made = make(cupy, shape, arrays, *x.shape[:2], given.dtype)
    y = torch.empty_like(x)
    made.y = view(y)

    def call() -> Any:
        made(given)
        return y

    call.made_by = kernels(lambda: made(given))  # type: ignore[attr-defined]
    return call


def kernels(call: Callable[[], Any]) -> list[str]:
    """What a call launches, one after the other."""
    with recorded() as calls:
        call()
    load(calls)
    launches: list[Any] = calls
    return ["cuBLASLt" if isinstance(c, Queued) else c.function.name for c in launches]


def timed(sides: dict[str, list[Callable[[], Any]]], runs: int) -> dict[str, dict[str, Any]]:
    """Each side from Python, and the GPU's time in a graph: on one set of weights, and on all.

    The sides take turns: a GPU that grows warm is slower, by up to a tenth.
    """
    found: dict[str, dict[str, Any]] = {}
    warm, cold, alone = {}, {}, {}
    for name, calls in sides.items():
        one = calls[0]
        once = gpu_alone([one, one], 5, None)["p50_us"] / 1e6
        nodes = int(max(2, min(NODES, SECONDS / once)))
        inner = int(max(2, min(50, SECONDS / once)))
        found[name] = {"python": from_python(one, max(2, runs // 3), inner)}
        alone[name] = captured([one]), 1
        warm[name] = captured([one] * nodes), nodes
        if len(calls) > 1:
            cold[name] = captured(calls), len(calls)
    for way, graphs in (("graph", alone), ("gpu_warm", warm), ("gpu_cold", cold)):
        for name in sides:
            found[name][way] = None
        for name, seconds in in_turn(graphs, runs).items():
            found[name][way] = spread(seconds)
    return found


def in_turn(graphs: dict[str, tuple[Any, int]], runs: int) -> dict[str, list[float]]:
    """Seconds of a node of each graph, run by run, one graph after the other."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    seconds: dict[str, list[float]] = {name: [] for name in graphs}
    for number in range(runs + 2):
        for name, (graph, nodes) in graphs.items():
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            if number >= 2:
                seconds[name].append(first.elapsed_time(last) / 1e3 / nodes)
    return seconds


def measure(layer: str, size: str, tokens: int, dtype: str, runs: int) -> dict[str, Any]:
    """A row: our layer, PyTorch's eager and compiled, their errors against float64."""
    shape, kind = SHAPES[size], getattr(torch, dtype)
    torch._dynamo.reset()
    w = weights(layer, shape, tokens, kind)
    x = torch.tensor(
        np.random.default_rng(1).standard_normal((1, tokens, shape.width), np.float32),
        device="cuda",
    ).to(kind)
    bytes_ = sum(t.numel() * t.element_size() for t in w.values())
    row: dict[str, Any] = {
        "layer": layer, "size": size, "tokens": tokens, "dtype": dtype, "weight_bytes": bytes_,
        "flops": operations(layer, shape, tokens),
        "not_stored_bytes": tokens * shape.inner * x.element_size(),
    }  # fmt: skip
    # Of few tokens, weights that no cache holds: sets of them, one after the other.
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    many = tokens <= FEW and 4 * cache < COLD_BYTES
    sets = int(max(2, min(NODES, 8 * cache // bytes_ + 1))) if many else 1
    everything = [w, *({n: t.clone() for n, t in w.items()} for _ in range(sets - 1))]
    if tokens <= FEW:
        row["read"] = read_time(everything, runs)
    peer = PEERS[layer]
    compiled = torch.compile(peer, dynamic=False)
    ours = [ours_of(LAYERS[layer][0], shape, each, x) for each in everything]
    row["kernels"] = ours[0].made_by  # type: ignore[attr-defined]
    sides = {
        "ours": ours,
        "eager": [lambda e=e: peer(e, shape, x) for e in everything],
        "compiled": [lambda e=e: compiled(e, shape, x) for e in everything],
    }
    places = np.unique(np.linspace(0, tokens - 1, CHECKED).astype(int))
    double = {n: t.double() for n, t in w.items()}
    exact = peer(double, shape, x.double())[0, places].cpu().numpy()
    del double
    found = {}
    for name, calls in sides.items():
        found[name] = calls[0]()[0, places].float().cpu().numpy()
    row |= timed(sides, runs)
    judge(row, found, exact, dtype)
    return row


def read_time(sets: list[dict[str, Any]], runs: int) -> dict[str, float]:
    """A kernel that only reads the matrices of each set, one set after the other."""
    reader = Reader()
    arrays = [[view(t) for t in w.values() if t.dim() == 2] for w in sets]
    calls = [lambda a=a: [reader.read(each) for each in a] for a in arrays]
    return gpu_alone(calls, runs, None)


def judge(row: dict[str, Any], found: dict[str, Any], exact: np.ndarray, dtype: str) -> None:
    """Errors of each side; what is outside the rule keeps no speed."""
    held = resolve_dtype(dtype, np.dtype(np.float32), "cuda")
    limit = Limit.of(found["eager"], exact, held)
    for name, values in found.items():
        largest, rms = errors(values, exact)
        mean = float(np.abs(values - exact).mean())
        inside = name in ("eager", "compiled") or bool(limit.admits(largest, rms))
        row[name] |= {
            "max_error": largest, "rms_error": rms, "mean_error": mean, "inside": inside,
        }  # fmt: skip
        if not inside:
            row[name] |= dict.fromkeys(("python", "graph", "gpu_warm", "gpu_cold"))


def all_layers(cases: list[tuple[str, str, int, str]], runs: int) -> Any:
    """A row for each case, on a stream of its own."""
    torch.backends.cuda.matmul.allow_tf32 = False
    stream = torch.cuda.Stream()
    with torch.inference_mode(), torch.cuda.stream(stream):
        cupy.cuda.ExternalStream(stream.cuda_stream).use()
        for layer, size, tokens, dtype in cases:
            yield measure(layer, size, tokens, dtype, runs)
            torch.cuda.empty_cache()
