"""The Hugging Face baseline under the same profile: operators, components, figures per token.

    python bench/peers/profile_hf.py [--model gpt2 --random] [--dtype float32] [--out FILE]

Operators come from torch.profiler over generate(), components from hooks around
the modules of an eager step: CUDA events on a GPU, the host's clock on the CPU.
Each table is measured in runs of its own, so that inner clocks do not slow the
outer ones. Attention is replaced for its own table by the same arithmetic in
eight timed parts, with the causal mask by torch.where that GPT-2 came with.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from hf_operators import operators

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from shared import config_of

from gpt2cupy import record

# "What is your name" in GPT-2's tokens: random weights have no tokenizer.
PROMPT_IDS = [2061, 318, 534, 1438]
ATTENTION = (
    "qkv product", "qkv reshape", "scores", "mask", "softmax", "values", "output reshape",
    "output product",
)  # fmt: skip
Row = dict[str, Any]


class Clock:
    """Times spans by name: between events on a GPU, else by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []
        self._open: dict[str, Any] = {}

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self, name: str) -> None:
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        self.spans.append((name, self._open.pop(name), self._now()))

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        self.start(name)
        yield
        self.stop(name)

    def hook(self, name: str, first: torch.nn.Module, last: torch.nn.Module | None = None) -> None:
        """Time from a module's start to its end, or to another's."""
        first.register_forward_pre_hook(lambda *_: self.start(name))
        (last or first).register_forward_hook(lambda *_: self.stop(name))

    def milliseconds(self) -> dict[str, list[float]]:
        """Times of each name, in order; forgets them."""
        if self.on_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = {}
        for name, begin, end in self.spans:
            taken = begin.elapsed_time(end) if self.on_gpu else (end - begin) * 1e3
            found.setdefault(name, []).append(taken)
        self.spans.clear()
        return found


class Runs:
    """Generations of ``tokens`` greedy tokens after a prompt, each token a step of the model."""

    def __init__(self, load: Callable[[], Any], ids: torch.Tensor, args: Any) -> None:
        self.load, self.ids, self.args = load, ids, args
        self.warmup = args.warmup

    @torch.inference_mode()
    def once(self, model: Any, clock: Clock) -> None:
        out = model(self.ids, use_cache=True, logits_to_keep=1)
        clock.milliseconds()  # what the prompt took is not counted
        for _ in range(self.args.tokens):
            fed, past = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
            with clock.span("step"):
                out = model(fed, past_key_values=past, use_cache=True, logits_to_keep=1)

    def measured(self, prepare: Callable[[Any, Clock], None]) -> dict[str, list[float]]:
        """Times of every span over the measured runs, on a model of its own."""
        model = self.load()
        clock = Clock(self.ids.device)
        prepare(model, clock)
        found: dict[str, list[float]] = {}
        for run in range(self.warmup + self.args.runs):
            self.once(model, clock)
            for name, times in clock.milliseconds().items():
                if run >= self.warmup:
                    found.setdefault(name, []).extend(times)
        # The GPU and its libraries are warm from now on: one run for what hooks bring.
        self.warmup = min(1, self.warmup)
        return found


def rows(times: dict[str, list[float]], names: tuple[str, ...], steps: int) -> list[Row]:
    """Average, total, count and share; a name that comes several times a step is counted so."""
    totals = {name: sum(times[name]) for name in names}
    whole = sum(totals.values())
    return [
        {
            "component": name,
            "avg_ms": totals[name] / len(times[name]),
            "total_ms": totals[name],
            "count": len(times[name]),
            "per_step": len(times[name]) / steps,
            "percent": 100 * totals[name] / whole,
        }
        for name in names
    ]


def on_model(model: Any, clock: Clock) -> None:
    body = model.transformer
    clock.hook("embeddings", body.wte, body.wpe)
    clock.hook("blocks", body.h[0], body.h[-1])
    clock.hook("final norm", body.ln_f)
    clock.hook("lm_head", model.lm_head)


def on_block(model: Any, clock: Clock) -> None:
    for block in model.transformer.h:
        for name, module in (
            ("ln_1", block.ln_1),
            ("attention", block.attn),
            ("ln_2", block.ln_2),
            ("mlp", block.mlp),
        ):
            clock.hook(name, module)


def on_mlp(model: Any, clock: Clock) -> None:
    for block in model.transformer.h:
        clock.hook("expansion", block.mlp.c_fc)
        clock.hook("activation", block.mlp.act)
        clock.hook("projection", block.mlp.c_proj)


def on_attention(model: Any, clock: Clock) -> None:
    positions = model.config.n_positions
    device = next(model.parameters()).device
    causal = torch.ones(positions, positions, dtype=torch.bool, device=device).tril()
    for block in model.transformer.h:
        block.attn.forward = timed_attention(block.attn, clock, causal[None, None])


def timed_attention(module: Any, clock: Clock, causal: torch.Tensor) -> Callable[..., Any]:
    """GPT2Attention.forward in eight timed parts."""

    def forward(
        hidden_states: torch.Tensor,
        cache: Any = None,
        attention_mask: Any = None,
        *,
        past_key_values: Any = None,  # what transformers before 5.24 call the cache
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = past_key_values if cache is None else cache
        with clock.span("qkv product"):
            qkv = module.c_attn(hidden_states)
        with clock.span("qkv reshape"):
            parts = qkv.split(module.split_size, dim=2)
            shape = (*qkv.shape[:-1], -1, module.head_dim)
            query, key, value = (part.view(shape).transpose(1, 2) for part in parts)
            if cache is not None:
                key, value = cache.update(key, value, module.layer_idx)
        with clock.span("scores"):
            weights = torch.matmul(query, key.transpose(-1, -2)) * module.scaling
        with clock.span("mask"):
            queries, keys = weights.shape[-2:]
            lowest = torch.full(
                [], torch.finfo(weights.dtype).min, dtype=weights.dtype, device=weights.device
            )
            weights = torch.where(causal[..., keys - queries : keys, :keys], weights, lowest)
        with clock.span("softmax"):
            weights = torch.nn.functional.softmax(weights, dim=-1).type(value.dtype)
            weights = module.attn_dropout(weights)
        with clock.span("values"):
            attended = torch.matmul(weights, value)
        with clock.span("output reshape"):
            attended = attended.transpose(1, 2).reshape(*hidden_states.shape).contiguous()
        with clock.span("output product"):
            attended = module.resid_dropout(module.c_proj(attended))
        return attended, weights

    return forward


def components(runs: Runs) -> Row:
    steps = runs.args.runs * runs.args.tokens
    plain = runs.measured(lambda *_: None)["step"]
    model = rows(runs.measured(on_model), ("embeddings", "blocks", "final norm", "lm_head"), steps)
    tables = {
        "model": model,
        "block": rows(runs.measured(on_block), ("ln_1", "attention", "ln_2", "mlp"), steps),
        "attention": rows(runs.measured(on_attention), ATTENTION, steps),
        "mlp": rows(runs.measured(on_mlp), ("expansion", "activation", "projection"), steps),
    }
    cuts = statistics.quantiles(plain, n=100, method="inclusive")
    per_token = {
        "mean_ms": statistics.mean(plain),
        "p50_ms": cuts[49],
        "p95_ms": cuts[94],
        "p99_ms": cuts[98],
        "tokens_per_s": 1e3 * runs.args.batch / statistics.mean(plain),
        "blocks_percent": model[1]["percent"],
    }
    return {"tables": tables, "per_token": per_token}


def loader(args: Any, device: torch.device) -> Callable[[], Any]:
    """Copies a model, so that hooks of one table do not stay for the next."""
    if args.random:
        torch.manual_seed(0)
        config = transformers.GPT2Config(**config_of(args.model).to_dict())
        config._attn_implementation = "eager"
        model = transformers.GPT2LMHeadModel(config)
    else:
        model = transformers.GPT2LMHeadModel.from_pretrained(
            args.model, attn_implementation="eager"
        )
    model = model.to(device, getattr(torch, args.dtype)).eval()
    return lambda: copy.deepcopy(model)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="name or folder; with --random the shape")
    parser.add_argument("--random", action="store_true", help="random weights of that shape")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", default="What is your name")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=50, help="under torch.profiler")
    parser.add_argument("--out", help="write a record here; otherwise print JSON")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    device = torch.device(args.device)
    ids = PROMPT_IDS
    if not args.random:
        ids = transformers.AutoTokenizer.from_pretrained(args.model)(args.prompt)["input_ids"]
    load = loader(args, device)
    if args.random:
        ids = [each % load().config.vocab_size for each in ids]
    prompt = torch.tensor([ids] * args.batch, device=device)
    results = {
        "settings": vars(args) | {"prompt_tokens": len(ids), "out": None},
        "weights": "random" if args.random else "trained",
        "timer": "events" if device.type == "cuda" else "perf_counter",
        **components(Runs(load, prompt, args)),
        "operators": operators(load(), prompt[:1], args.new_tokens),
    }
    if args.out:
        record.write(args.out, results, gpu=device.type == "cuda")
    else:
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
