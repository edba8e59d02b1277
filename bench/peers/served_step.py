"""A decode step in PyTorch behind the server's fronts; functions as those of served.py.

torch_rms, torch_ours   captured, with RMS norms: F.rms_norm, or gpt2cupy.torch's
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

from served import BATCH, Peer, _of, _versions

from gpt2cupy.generation.request import Request
from gpt2cupy.generation.results import Block


class TorchRows(Peer):
    """A decode step of 32 rows in PyTorch, each at a position of its own.

    Prompts of one length that wait run together. The step is captured in a CUDA graph; a row that
    nobody has computes something that is thrown away.
    """

    def __init__(self, settings: Any, norm: Callable[..., Any]) -> None:
        super().__init__()
        import torch
        import torch.nn.functional as F
        from safetensors.torch import load_file

        self.torch, self.F, self.norm = torch, F, norm
        self.device, dtype = _of(settings)
        folder = Path(settings.model)
        config = json.loads((folder / "config.json").read_text())
        self.heads, self.width = config["n_head"], config["n_embd"]
        self.eps, self.vocab = config["layer_norm_epsilon"], config["vocab_size"]
        found = {
            key.removeprefix("transformer."): value.to(self.device, dtype)
            for key, value in load_file(folder / "model.safetensors").items()
        }
        self.wte = F.pad(found["wte.weight"], (0, 0, 0, -self.vocab % 64)).contiguous()
        self.wpe, self.last = found["wpe.weight"], found["ln_f.weight"]
        self.layers = [self._layer(found, f"h.{i}.") for i in range(config["n_layer"])]
        self.capacity = settings.capacity or config["n_positions"]
        shape = (BATCH, self.heads, self.capacity, self.width // self.heads)
        options: Any = {"dtype": dtype, "device": self.device}
        self.caches = [
            (torch.zeros(shape, **options), torch.zeros(shape, **options)) for _ in self.layers
        ]
        self.fed = torch.zeros(BATCH, dtype=torch.long, device=self.device)
        self.positions = torch.zeros(BATCH, dtype=torch.long, device=self.device)
        self.places = torch.arange(self.capacity, device=self.device)
        self.each = torch.arange(BATCH, device=self.device)
        self.free = list(range(BATCH))
        self.row_of: dict[Any, int] = {}
        self.replay = self._captured() if self.device != "cpu" else self._step

    def _layer(self, found: dict[str, Any], prefix: str) -> dict[str, Any]:
        names = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        layer = {
            name: (
                found[f"{prefix}{name}.weight"].t().contiguous(),
                found[f"{prefix}{name}.bias"],
            )
            for name in names
        }
        return layer | {n: found[f"{prefix}{n}.weight"] for n in ("ln_1", "ln_2")}

    def _captured(self) -> Callable[[], None]:
        torch = self.torch
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.inference_mode(), torch.cuda.stream(stream):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def _step(self) -> None:
        """Feed every row its token at its position, choose the next one."""
        F, each, at = self.F, self.each, self.positions
        x = self.wte[self.fed] + self.wpe[at]
        mask = (self.places[None] <= at[:, None]).view(BATCH, 1, 1, -1)
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            qkv = F.linear(self.norm(x, layer["ln_1"], self.eps), *layer["attn.c_attn"])
            q, k, v = qkv.view(BATCH, 3, self.heads, -1).unbind(1)
            keys[each, :, at] = k
            values[each, :, at] = v
            y = F.scaled_dot_product_attention(q.unsqueeze(2), keys, values, attn_mask=mask)
            x = x + F.linear(y.reshape(BATCH, self.width), *layer["attn.c_proj"])
            h = F.linear(self.norm(x, layer["ln_2"], self.eps), *layer["mlp.c_fc"])
            x = x + F.linear(F.gelu(h, approximate="tanh"), *layer["mlp.c_proj"])
        self.fed.copy_(self._choose(x))
        self.positions.copy_((at + 1).clamp(max=self.capacity - 1))

    def _choose(self, x: Any) -> Any:
        torch = self.torch
        logits = self.F.linear(self.norm(x, self.last, self.eps), self.wte)[:, : self.vocab]
        noise = torch.empty_like(logits, dtype=torch.float32).exponential_()
        return (logits.float().softmax(-1) / noise).argmax(-1)  # a draw without a sync

    def _prefill(self, prompts: list[np.ndarray], rows: list[int]) -> list[int]:
        """Run prompts of one length into rows; returns their first tokens."""
        torch, F = self.torch, self.F
        ids = torch.from_numpy(np.array(prompts, np.int64)).to(self.device)
        at = torch.tensor(rows, device=self.device)
        count, length = ids.shape
        x = self.wte[ids] + self.wpe[:length]
        for layer, (keys, values) in zip(self.layers, self.caches, strict=True):
            qkv = F.linear(self.norm(x, layer["ln_1"], self.eps), *layer["attn.c_attn"])
            q, k, v = qkv.view(count, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            keys[at, :, :length], values[at, :, :length] = k, v
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + F.linear(y.transpose(1, 2).reshape(x.shape), *layer["attn.c_proj"])
            h = F.linear(self.norm(x, layer["ln_2"], self.eps), *layer["mlp.c_fc"])
            x = x + F.linear(F.gelu(h, approximate="tanh"), *layer["mlp.c_proj"])
        first = self._choose(x[:, -1])
        self.fed[at] = first
        self.positions[at] = length
        return first.tolist()

    def step(self) -> Block:
        with self.torch.inference_mode():
            if self.waiting and self.free:
                entered: list[Request] = []
                # Those that wait and are as long as the first one run together.
                length = len(self.waiting[0].prompt)
                while self.waiting and self.free and len(self.waiting[0].prompt) == length:
                    entered.append(self.waiting.popleft())
                    self.ids[entered[-1].key] = []
                    self.row_of[entered[-1].key] = self.free.pop()
                rows = [self.row_of[request.key] for request in entered]
                chosen = self._prefill([request.prompt for request in entered], rows)
                self.running.extend(entered)
                return self._after(self.block(entered, chosen))
            self.replay()
            ids = self.fed.tolist()
        rows = [self.row_of[request.key] for request in self.running]
        return self._after(self.block(self.running, [ids[row] for row in rows]))

    def _after(self, block: Block) -> Block:
        """Free the rows of those that are done or were cancelled."""
        for request in list(self.running):
            if request.key not in self.ids:
                self.running.remove(request)
                self.free.append(self.row_of.pop(request.key))
        return block


def _torch_engine(settings: Any, norm: Callable[..., Any], what: str) -> tuple[Any, dict[str, Any]]:
    import torch

    engine = TorchRows(settings, norm)
    with torch.inference_mode():  # libraries choose kernels by shape
        for count in (1, 2, 8, BATCH):
            prompts = [np.zeros(engine.capacity // 2, np.int32)] * count
            engine._prefill(prompts, list(range(count)))
    about = {"slots": BATCH, "device": engine.device, "norm": what, "capacity": engine.capacity}
    return engine, about | {"versions": _versions(torch)}


def torch_rms(settings: Any) -> tuple[Any, dict[str, Any]]:
    import torch.nn.functional as F

    def norm(x: Any, weight: Any, eps: float) -> Any:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)

    return _torch_engine(settings, norm, "torch.nn.functional.rms_norm")


def torch_ours(settings: Any) -> tuple[Any, dict[str, Any]]:
    from gpt2cupy.torch import rms_norm

    return _torch_engine(settings, rms_norm, "gpt2cupy.torch.rms_norm")
