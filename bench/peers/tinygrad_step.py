"""GPT-2 in tinygrad: the step captured by TinyJit, its position a symbolic variable.

Weights as contiguous rows, a static cache of the run's own size, ids kept on the device. On a
GPU tinygrad searches for the fastest form of each kernel (JITBEAM=2 unless it is set): that is
in the time of the first run.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from interface import Job, Run, serve

os.environ.setdefault("JITBEAM", "2")

from tinygrad import Device, Tensor, TinyJit, Variable, dtypes
from tinygrad.nn.state import safe_load

PRODUCTS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
NORMS = ("ln_1", "ln_2")


class Model:
    """Weights, cache and the state of one batch."""

    def __init__(self, job: Job) -> None:
        folder = Path(job["folder"])
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.eps = config["n_head"], config["layer_norm_epsilon"]
        self.vocab = config["vocab_size"]
        device = "CPU" if job["device"] == "cpu" else Device.DEFAULT
        found = {
            key.removeprefix("transformer."): value.to(device).realize()
            for key, value in safe_load(folder / "model.safetensors").items()
        }
        self.wte, self.wpe = found["wte.weight"], found["wpe.weight"]
        self.dtype = self.wte.dtype
        self.last = found["ln_f.weight"], found["ln_f.bias"]
        self.layers = [self._layer(found, f"h.{i}.") for i in range(config["n_layer"])]
        batch, prompt = len(job["prompts"]), len(job["prompts"][0])
        self.capacity = prompt + job["tokens"]
        shape = (2, batch, self.heads, self.capacity, config["n_embd"] // self.heads)

        def zeros(*shape: int, dtype: Any) -> Any:
            return Tensor.zeros(*shape, dtype=dtype, device=device).contiguous().realize()

        self.cache = [zeros(*shape, dtype=self.dtype) for _ in self.layers]
        self.ids = zeros(batch, 1, dtype=dtypes.int)
        self.seen = zeros(batch, self.capacity, dtype=dtypes.int)
        self.prompts = Tensor(job["prompts"], dtype=dtypes.int, device=device).realize()
        self.position = Variable("position", 1, self.capacity - 1)
        self.run_prompt = TinyJit(lambda ids: self.forward(ids, 0))
        self.run_step = TinyJit(lambda position: self.forward(self.ids, position))

    def _layer(self, found: dict[str, Any], prefix: str) -> dict[str, Any]:
        def rows(name: str) -> tuple[Any, Any]:  # Conv1D keeps [in, out]
            weight = found[f"{prefix}{name}.weight"].T.contiguous().realize()
            return weight, found[f"{prefix}{name}.bias"]

        norms = {n: (found[f"{prefix}{n}.weight"], found[f"{prefix}{n}.bias"]) for n in NORMS}
        return norms | {name: rows(name) for name in PRODUCTS}

    def norm(self, x: Any, weights: tuple[Any, Any]) -> Any:
        return x.layernorm(eps=self.eps) * weights[0] + weights[1]

    def linear(self, x: Any, weights: tuple[Any, Any]) -> Any:
        return x.linear(weights[0].T, weights[1])

    def forward(self, ids: Any, position: Any) -> None:
        """Feed ids [B, T] at a position; choose the next ids, all in place."""
        batch, length = ids.shape
        end = position + length
        x = self.wte[ids] + self.wpe[position:end]
        for layer, cache in zip(self.layers, self.cache, strict=True):
            qkv = self.linear(self.norm(x, layer["ln_1"]), layer["attn.c_attn"])
            parts = qkv.reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            cache[:, :, :, position:end].assign(parts[1:]).realize()
            keys, values = cache[0, :, :, 0:end], cache[1, :, :, 0:end]
            y = parts[0].scaled_dot_product_attention(keys, values, is_causal=length > 1)
            y = y.transpose(1, 2).reshape(batch, length, -1)
            x = x + self.linear(y, layer["attn.c_proj"])
            h = self.linear(self.norm(x, layer["ln_2"]), layer["mlp.c_fc"])
            x = x + self.linear(h.gelu(), layer["mlp.c_proj"])
        logits = self.norm(x[:, -1:], self.last).linear(self.wte.T)
        self.ids.assign(logits.argmax(-1).cast(dtypes.int)).realize()
        self.seen[:, end : end + 1].assign(self.ids).realize()


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    model = Model(job)
    length = len(job["prompts"][0])

    def wait() -> float:
        Device[model.wte.device].synchronize()
        return time.perf_counter()

    def run(tokens: int) -> tuple[list[int], float, float, float]:
        begin = wait()
        model.run_prompt(model.prompts)
        first = wait()
        for step in range(tokens - 1):
            model.run_step(model.position.bind(length + step))
        last = wait()
        return model.seen[0].tolist()[length : length + tokens], begin, first, last

    return run, {"device": model.wte.device, "search": os.environ["JITBEAM"]}


if __name__ == "__main__":
    serve(("tinygrad",), prepare)
