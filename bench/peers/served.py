"""Engines that bench/server.py puts behind the server's fronts in place of ours.

Each function takes the server's settings and returns an engine, which has ``submit``, ``cancel``,
``step`` and ``idle``, and what ``/ready`` says of it.

transformers_generate   waiting requests in batches of up to 32, each run to its end by generate()
unfused                 our engine; residual additions are kernels of their own, and a norm reads
                        its rows once for each of its passes
"""

from __future__ import annotations

import functools
import queue
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpt2cupy.generation.request import Request
from gpt2cupy.generation.results import Block, Finished

BATCH = 32
_GATHER = 0.005  # seconds in which requests of one moment become one batch


class _Cache:
    slots = capacity = 1
    lengths = np.zeros(1, np.int64)


@dataclass(frozen=True)
class _Row:
    request: Request


class _Scheduler:
    """What the server's gauges ask of an engine."""

    prompts: tuple[_Row, ...] = ()

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    @property
    def rows(self) -> list[_Row]:
        return [_Row(request) for request in self._peer.running]

    @property
    def waiting(self) -> int:
        return len(self._peer.waiting)


class Peer:
    """What engines of other libraries share: who waits, who runs, what they have so far."""

    def __init__(self) -> None:
        self.scheduler, self.cache, self.discarded = _Scheduler(self), _Cache(), 0
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.ids: dict[Any, list[int]] = {}

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    def submit(self, request: Request) -> Any:
        self.waiting.append(request)
        return request.key

    def cancel(self, key: Any) -> None:
        self.waiting = deque(each for each in self.waiting if each.key != key)
        self.ids.pop(key, None)

    def block(self, requests: list[Request], chosen: list[int]) -> Block:
        """Tokens of requests that still want them."""
        keys, ids, finished = [], [], []
        for request, id_ in zip(requests, chosen, strict=True):
            own = self.ids.get(request.key)
            if own is None:
                continue
            own.append(id_)
            keys.append(request.key)
            ids.append(id_)
            limit = request.params.limit(1 << 20)
            if len(own) >= limit or id_ in request.ends:
                done = np.array(self.ids.pop(request.key), np.int32)
                reason = "length" if len(own) >= limit else "eos"
                finished.append(Finished(request, done, np.zeros(len(done), np.float32), reason))
        return Block(keys, np.array(ids, np.int32), np.zeros(len(ids), np.float32), None, finished)


class Generating(Peer):
    """transformers' generate over batches of waiting requests."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.tokens: queue.Queue[list[int] | None] = queue.Queue()

    def step(self) -> Block:
        if not self.running:
            time.sleep(_GATHER)
            while self.waiting and len(self.running) < BATCH:
                request = self.waiting.popleft()
                self.ids[request.key] = []
                self.running.append(request)
            threading.Thread(target=self._generate, args=(list(self.running),)).start()
        chosen = self.tokens.get()
        if chosen is None:
            self.running.clear()
            return Block([], np.zeros(0, np.int32), np.zeros(0, np.float32), None, [])
        return self.block(self.running, chosen)

    def put(self, chosen: Any) -> None:
        """What generate() calls with the prompts, and then with the tokens of each step."""
        if chosen.ndim == 1:
            self.tokens.put(chosen.tolist())

    def end(self) -> None:
        pass

    def _generate(self, requests: list[Request]) -> None:
        import torch

        longest = max(len(request.prompt) for request in requests)
        ids = torch.zeros((len(requests), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(requests):
            ids[row, longest - len(request.prompt) :] = torch.from_numpy(request.prompt.copy())
            mask[row, longest - len(request.prompt) :] = 1
        device = self.model.device
        wanted = max(request.params.limit(1 << 20) for request in requests)
        with torch.inference_mode():
            self.model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=wanted,
                min_new_tokens=wanted,
                do_sample=True,
                top_k=0,
                streamer=self,
                pad_token_id=0,
                eos_token_id=None,
            )
        self.tokens.put(None)


def transformers_generate(settings: Any) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.backends.cuda.enable_cudnn_sdp(False)  # which plans anew for each length: 50 ms a step
    device, dtype = _of(settings)
    model = transformers.GPT2LMHeadModel.from_pretrained(settings.model, dtype=dtype)
    engine = Generating(model.to(device).eval())
    prompt = torch.zeros((BATCH, 8), dtype=torch.long, device=device)
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=4, pad_token_id=0, do_sample=False)
    about = {"slots": BATCH, "device": device, "versions": _versions(torch, transformers)}
    return engine, about


def _of(settings: Any) -> tuple[str, Any]:
    import torch

    device = "cuda" if settings.device in ("auto", "cuda") else settings.device
    return device, getattr(torch, settings.dtype if device != "cpu" else "float32")


def _versions(*modules: Any) -> dict[str, str]:
    return {module.__name__: str(module.__version__) for module in modules}


def unfused(settings: Any) -> tuple[Any, dict[str, Any]]:
    """Our engine, with what fuses a norm or a residual addition switched off."""
    import msgspec

    from gpt2cupy import ops
    from gpt2cupy.ops.core.launch import device_empty
    from gpt2cupy.server.engine_process import make_engine

    fused = ops.linear

    def linear(
        x: Any, weight: Any, bias: Any = None, *, residual: Any = None, out: Any = None, **how: Any
    ) -> Any:
        if residual is None:
            return fused(x, weight, bias, out=out, **how)
        empty = np.empty if isinstance(x, np.ndarray) else device_empty
        product = fused(x, weight, bias, out=empty(out.shape, out.dtype), **how)
        return ops.bias_act(product, None, None, residual=residual, out=out)

    def norm_linear(
        x: Any, norm_weight: Any, norm_bias: Any, eps: float, weight: Any, bias: Any = None, *,
        h: Any = None, shift: Any = None, **how: Any,
    ) -> Any:  # fmt: skip
        return fused(_norm_in_passes(x, norm_weight, norm_bias, eps, h), weight, bias, **how)

    vars(ops).update(linear=linear, norm_linear=norm_linear)
    engine, about = make_engine(msgspec.structs.replace(settings, engine=""))
    return engine, about | {"kernels_of_a_step": _kernels(engine)}


def fused(settings: Any) -> tuple[Any, dict[str, Any]]:
    """Our engine as it is, with the names of its kernels."""
    import msgspec

    from gpt2cupy.server.engine_process import make_engine

    engine, about = make_engine(msgspec.structs.replace(settings, engine=""))
    return engine, about | {"kernels_of_a_step": _kernels(engine)}


IN_PASSES = r"""
#include <cuda_fp16.h>
#include <cuda_bf16.h>
// A block a row, which is read once for its mean, once for its variance, and once to be normalised.
__device__ float block_sum(float value) {
  __shared__ float sums[128];
  __syncthreads();
  sums[threadIdx.x] = value;
  for (int half = 64; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
  }
  __syncthreads();
  return sums[0];
}
extern "C" __global__ void layer_norm_in_passes(const float* x, const ELEM* weight,
                                                const ELEM* bias, ELEM* y, float eps, int C) {
  x += (size_t)blockIdx.x * C;
  y += (size_t)blockIdx.x * C;
  float sum = 0.0f, squares = 0.0f;
  for (int c = threadIdx.x; c < C; c += 128) sum += x[c];
  float mean = block_sum(sum) / C;
  for (int c = threadIdx.x; c < C; c += 128) squares += (x[c] - mean) * (x[c] - mean);
  float scale = rsqrtf(block_sum(squares) / C + eps);
  for (int c = threadIdx.x; c < C; c += 128)
    y[c] = ELEM((x[c] - mean) * scale * float(weight[c]) + float(bias[c]));
}
"""


def _norm_in_passes(x: Any, weight: Any, bias: Any, eps: float, out: Any) -> Any:
    """A layer norm that is a kernel of its own and reads its rows three times."""
    from gpt2cupy import ops
    from gpt2cupy.ops.core import tape

    if isinstance(x, np.ndarray):
        return ops.layer_norm(x, weight, bias, eps, out=out)
    values = (x, weight, bias, out, np.float32(eps), np.int32(x.shape[-1]))
    tape.submit(tape.Launch(_in_passes(weight.dtype.name), (len(x),), (128,), values))
    return out


@functools.lru_cache
def _in_passes(dtype: str) -> Any:
    import cupy

    from gpt2cupy.ops.core.compiler import _cuda_includes

    kind = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float"}[dtype]
    options = ("-std=c++17", *_cuda_includes())
    kernel = cupy.RawKernel(IN_PASSES.replace("ELEM", kind), "layer_norm_in_passes", options)
    kernel.compile()  # nothing may be loaded while a stream is being captured
    return kernel


def _kernels(engine: Any) -> dict[str, int]:
    """Names of the kernels of a step of 32 rows, with their blocks, and how many of each."""
    if isinstance(engine.model.weights.wpe, np.ndarray):
        return {}
    rows = min(BATCH, engine.slots)
    with engine.device, engine.stream:
        decoder = engine.rows.decoder(rows)
        decoder.prepare(engine.state.first(rows))
    found: Counter[str] = Counter()
    for call in decoder.calls:
        function = getattr(call, "function", None)
        name = getattr(function, "name", None) or getattr(function, "__name__", "library")
        found[f"{name} {getattr(call, 'grid', '')} {getattr(call, 'block', '')}"] += 1
    return dict(found)
