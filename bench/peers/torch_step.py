"""A GPT-2 decode step written by hand in PyTorch, as fast as PyTorch makes it.

Weights as contiguous rows, fused qkv product, a static cache of the run's own size, ids
and positions kept on the GPU, the step compiled by Inductor and captured in a CUDA graph
of our own: a step is one replay. Three forms are built where they apply, and the fastest
is timed: attention by SDPA or by plain products that Inductor fuses, and for one row the
products as Inductor's generated kernels instead of cuBLAS's. On the CPU nothing is compiled.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from interface import Job, Run, serve
from safetensors.torch import load_file

ALIGN = 8  # tokens: rows of the mask that SDPA's kernels like


class Model:
    """Weights, cache and the state of one batch; ``step`` feeds one token per row."""

    def __init__(self, job: Job, attention: str) -> None:
        folder, device = Path(job["folder"]), job["device"]
        config = json.loads((folder / "config.json").read_text())
        self.attention, self.eps = attention, config["layer_norm_epsilon"]
        self.heads, self.width = config["n_head"], config["n_embd"]
        self.vocab = config["vocab_size"]
        dtype = getattr(torch, job["dtype"])
        found = {
            key.removeprefix("transformer."): value.to(device, dtype)
            for key, value in load_file(folder / "model.safetensors").items()
        }
        # Rows of 16 bytes and more for the logits' product; the padding never wins.
        self.wte = F.pad(found["wte.weight"], (0, 0, 0, -self.vocab % 64)).contiguous()
        self.wpe, self.last = found["wpe.weight"], (found["ln_f.weight"], found["ln_f.bias"])
        self.layers = [self._layer(found, f"h.{i}.") for i in range(config["n_layer"])]
        batch, prompt = len(job["prompts"]), len(job["prompts"][0])
        self.capacity = -(-(prompt + job["tokens"]) // ALIGN) * ALIGN
        shape = (batch, self.heads, self.capacity, self.width // self.heads)
        self.cache = [
            tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in ("keys", "values"))
            for _ in self.layers
        ]
        self.ids = torch.zeros(batch, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(self.capacity, device=device)
        self.seen = torch.zeros((batch, self.capacity), dtype=torch.long, device=device)

    def _layer(self, found: dict[str, Any], prefix: str) -> dict[str, Any]:
        def rows(name: str) -> tuple[Any, Any]:  # Conv1D keeps [in, out]
            weight = found[f"{prefix}{name}.weight"].t().contiguous()
            return weight, found[f"{prefix}{name}.bias"]

        norms = {n: (found[f"{prefix}{n}.weight"], found[f"{prefix}{n}.bias"]) for n in NORMS}
        return norms | {name: rows(name) for name in PRODUCTS}

    def norm(self, x: Any, weights: tuple[Any, Any]) -> Any:
        return F.layer_norm(x, (self.width,), *weights, self.eps)

    def linear(self, x: Any, weights: tuple[Any, Any]) -> Any:
        # Apart from the bias: only a product without one may become a generated kernel.
        return F.linear(x, weights[0]) + weights[1]

    def attend(self, q: Any, k: Any, v: Any) -> Any:
        """One query per row [B, NH, HS] over the cache up to the current position."""
        visible = self.places <= self.position
        scale = q.shape[-1] ** -0.5
        if self.attention == "sdpa":
            mask = visible.view(1, 1, 1, -1)
            return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=mask)
        scores = (q.unsqueeze(2).float() * k.float()).sum(-1) * scale
        shares = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return (shares.unsqueeze(-1) * v.float()).sum(2).to(q.dtype)

    def step(self) -> None:
        """Feed ``ids`` at ``position``; choose the next ids and advance, all in place."""
        x = self.wte[self.ids] + self.wpe[self.position]
        batch = len(self.ids)
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            qkv = self.linear(self.norm(x, layer["ln_1"]), layer["attn.c_attn"])
            q, k, v = qkv.view(batch, 3, self.heads, -1).unbind(1)
            keys.index_copy_(2, self.position, k.unsqueeze(2))
            values.index_copy_(2, self.position, v.unsqueeze(2))
            y = self.attend(q, keys, values).reshape(batch, self.width)
            x = x + self.linear(y, layer["attn.c_proj"])
            h = self.linear(self.norm(x, layer["ln_2"]), layer["mlp.c_fc"])
            x = x + self.linear(F.gelu(h, approximate="tanh"), layer["mlp.c_proj"])
        self._choose(x)
        self.position.add_(1)
        self.seen.index_copy_(1, self.position, self.ids.unsqueeze(1))

    def _choose(self, x: Any) -> None:
        logits = F.linear(self.norm(x, self.last), self.wte)
        self.ids.copy_(logits[:, : self.vocab].argmax(-1))

    def prefill(self, prompts: Any) -> None:
        """Run whole prompts [B, T], fill the cache, choose the first tokens."""
        batch, length = prompts.shape
        x = self.wte[prompts] + self.wpe[:length]
        for layer, (keys, values) in zip(self.layers, self.cache, strict=True):
            qkv = self.linear(self.norm(x, layer["ln_1"]), layer["attn.c_attn"])
            q, k, v = qkv.view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            keys[:, :, :length], values[:, :, :length] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.linear(y.transpose(1, 2).reshape(x.shape), layer["attn.c_proj"])
            h = self.linear(self.norm(x, layer["ln_2"]), layer["mlp.c_fc"])
            x = x + self.linear(F.gelu(h, approximate="tanh"), layer["mlp.c_proj"])
        self._choose(x[:, -1])
        self.position.fill_(length)
        self.seen[:, length] = self.ids


NORMS = ("ln_1", "ln_2")
PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def captured(model: Model, generated: bool) -> Callable[[], None]:
    """The step compiled and captured; a call is one replay."""
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    # With this Inductor makes a product of one row a kernel of its own, and tunes it.
    inductor.coordinate_descent_tuning = generated
    compiled = torch.compile(model.step, fullgraph=True, dynamic=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.position.zero_()
            compiled()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    model.position.zero_()
    with torch.cuda.graph(graph):
        compiled()
    return graph.replay


@torch.inference_mode()
def best_step(job: Job) -> tuple[Model, Callable[[], None], dict[str, Any]]:
    """The fastest of the forms of the step; those that fail are named with the reason."""
    forms = [("sdpa", False), ("products", False)]
    if len(job["prompts"]) == 1:
        forms.append(("products", True))
    tried: dict[str, Any] = {}
    best: tuple[float, Any, Any, str] | None = None
    for attention, generated in forms:
        name = f"{attention}, {'generated' if generated else 'cuBLAS'} products"
        try:
            model = Model(job, attention)
            step = captured(model, generated)
            us = time_of(model, step, len(job["prompts"][0]) + job["tokens"] // 2)
        except Exception as error:
            tried[name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        tried[name] = round(us, 1)
        if best is None or us < best[0]:
            best = us, model, step, name
    if best is None:
        raise RuntimeError(f"no form of the step works: {tried}")
    return best[1], best[2], {"form": best[3], "us_of_forms": tried}


def time_of(model: Model, step: Callable[[], None], position: int) -> float:
    """Microseconds of a replay, 50 in a row, at about ``position``."""
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    model.position.fill_(max(position - 25, 0))
    torch.cuda.synchronize()
    count = min(50, model.capacity - max(position - 25, 0) - 1)
    first.record()
    for _ in range(count):
        step()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) * 1e3 / count


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    on_gpu = job["device"] != "cpu"
    start = time.perf_counter()
    if on_gpu:
        model, step, about = best_step(job)
        about["compile_s"] = time.perf_counter() - start
    else:
        model = Model(job, "sdpa")
        step, about = model.step, {"form": "sdpa, not compiled"}
    prompts = torch.tensor(job["prompts"], device=job["device"])

    def wait() -> float:
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    @torch.inference_mode()
    def run(tokens: int) -> tuple[list[int], float, float, float]:
        begin = wait()
        model.prefill(prompts)
        first = wait()
        for _ in range(tokens - 1):
            step()
        last = wait()
        length = prompts.shape[1]
        return model.seen[0, length : length + tokens].tolist(), begin, first, last

    return run, about


if __name__ == "__main__":
    serve(("torch",), prepare)
