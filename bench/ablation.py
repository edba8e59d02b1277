"""What each optimisation gives: tokens/s with all of them, without each, and with none.

    python bench/ablation.py [--disable NAME,...] [--batch 1,4,16] [--tokens 512]
                             [--dtype bfloat16,float16] [--out FILE]

The last row has only the KV cache. With --disable only these are switched off, one
at a time and together; --list shows the switches. Where the persistent step is what
"auto" takes, the others are switched off in the graph, which it replaces. Texts are
greedy, 512 tokens after a prompt of 32, read by the host as they would be shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
from arguments import check_fits, checked, chosen, main, names, numbers, parser
from shared import DTYPES, Kept, backends, config_of, paths, random_model, too_large

from gpt2cupy import GPT2, SamplingParams, decode, ops
from gpt2cupy.decode import graph
from gpt2cupy.errors import InputError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.ops.gpt2 import step
from gpt2cupy.timing import Timing

PROMPT = 32


@dataclass(frozen=True)
class Switch:
    """One optimisation: what it is, where it applies, and how an engine goes without it.

    ``applies`` says whether there is anything to switch off, given the device, dtype and batch;
    ``without`` switches it off for an engine that has not run yet, and on again on leaving.
    """

    what: str
    applies: Callable[[str, str, int], bool]
    without: Callable[[Engine], AbstractContextManager[Any]]


def _norm_then_linear(
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    *args: Any,
    h: Any = None,
    shift: Any = None,
    **options: Any,
) -> Any:
    """What ops.norm_linear computes, as two ops, which have no use for a shift."""
    return ops.linear(ops.layer_norm(x, weight, bias, eps, out=h), *args, **options)


def _graphs(device: str, dtype: str, batch: int) -> bool:
    return "graph" in paths(device)


def _decoder(engine: Engine, path: str) -> Any:
    """Steps of all rows by another path; "auto" without a number of rows is a graph."""
    return patch.dict(engine.rows.decoders, {engine.slots: decode.decoder(engine.model, path)})


@contextmanager
def _cublas(engine: Engine) -> Iterator[None]:
    before, engine.model.gemv = engine.model.gemv, "cublas"
    try:
        yield
    finally:
        engine.model.gemv = before


# Only what can really be switched off; a new optimisation adds an entry.
SWITCHES = {
    "persistent": Switch(
        "the decode step is one kernel, where that is the fastest; off: a captured graph",
        lambda device, dtype, batch: device != "cpu" and dtype != "float32" and batch in step.ROWS,
        lambda engine: _decoder(engine, "auto"),
    ),
    "graph": Switch(
        "the decode step is one captured graph; off: a launch from Python for each kernel",
        _graphs,
        lambda engine: _decoder(engine, "eager"),
    ),
    "overlap": Switch(
        "kernels of the graph load weights before the one ahead ends; off: one after another",
        _graphs,
        lambda engine: patch.object(graph, "has_clusters", lambda: False),
    ),
    "fused-norm": Switch(
        "norm inside the GEMV; off: a kernel of its own",
        lambda device, dtype, batch: batch == 1 and device != "cpu",
        lambda engine: patch.object(ops, "norm_linear", _norm_then_linear),
    ),
    "gemv": Switch(
        "our GEMV and GEMM of few rows with norm, bias, activation and residual inside; off: "
        "cuBLAS and kernels for the rest",
        lambda device, dtype, batch: len(backends(dtype, batch, device)) > 1,
        _cublas,
    ),
    "one-pass-sampling": Switch(
        "sampling with no more than a temperature in one pass over the logits; off: as "
        "for top-k and top-p",
        lambda device, dtype, batch: device != "cpu",
        lambda engine: patch.object(engine.state, "shaped", {-1}),
    ),
}


def applicable(device: str, dtypes: list[str], batches: list[int]) -> list[str]:
    """The switches that change anything for some dtype and batch on this device."""
    cases = [(device, dtype, batch) for dtype in dtypes for batch in batches]
    return [name for name, one in SWITCHES.items() if any(one.applies(*case) for case in cases)]


def check_applies(wanted: list[str], there: list[str], device: str) -> None:
    """Raise InputError for a switch that changes nothing with these arguments."""
    for name in wanted:
        if name not in there:
            raise InputError(
                f"switch {name!r} does not apply here",
                where=f"--device {device}, and the dtypes and batches asked for",
                remedy=f"Those that do: {', '.join(there) or 'none'}.",
            )


def combinations(switches: list[str]) -> list[tuple[str, ...]]:
    """Nothing off, each one off, all off; those of the graph without the persistent step."""
    first = tuple(name for name in switches if name == "persistent")
    each = [(*first, name) for name in switches if name not in first]
    return list(dict.fromkeys([(), first, *each, tuple(switches)]))


def base(model: GPT2, batch: int, wanted: list[str]) -> str:
    """The decode path with nothing off: the fastest, if "persistent" may be switched off."""
    plain = decode.decoder(model).name
    if "persistent" not in wanted:
        return plain
    fastest = next(iter(decode.times(model, batch)))
    if fastest == plain and "persistent" in decode.usable(model, batch):
        print(f"{model.dtype.name} batch {batch}: auto does not take the persistent step")
    return fastest


def speed(model: GPT2, path: str, off: tuple[str, ...], batch: int, args: Any) -> Timing:
    """Time of a step over whole texts, with some switches off."""
    capacity = min(PROMPT + args.tokens, model.config.n_positions)
    engine = Engine(model, batch, capacity, decode=path)
    with ExitStack() as stack:
        for name in off:
            stack.enter_context(SWITCHES[name].without(engine))
        return text_time(engine, batch, args)


def text_time(engine: Engine, batch: int, args: Any) -> Timing:
    """Time of a step over whole texts."""
    vocab = engine.model.config.vocab_size
    rng = np.random.default_rng(1)
    params = SamplingParams(temperature=0, max_new_tokens=args.tokens)

    def generate() -> float:
        prompts = rng.integers(0, vocab, (batch, PROMPT)).astype(np.int32)
        first, requests = 0.0, [Request(i, ids, params) for i, ids in enumerate(prompts)]
        for count, _ in enumerate(engine.run(requests), start=1):
            if count == batch:
                first = time.perf_counter()
        return (time.perf_counter() - first) / (args.tokens - 1)

    generate()
    return Timing.of([generate() for _ in range(args.runs)])


def run() -> None:
    options = parser(__doc__, "ablation.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", type=names, default=["bfloat16", "float16"])
    options.add_argument("--batch", type=numbers, default=[1, 4, 16])
    options.add_argument("--tokens", type=int, default=512)
    options.add_argument("--disable", type=names, help="switches; all by default")
    options.add_argument("--list", action="store_true", help="show the switches and end")
    options.add_argument("--runs", type=int, default=3)
    args = options.parse_args()
    chosen(args.dtype, DTYPES, "dtype")
    chosen(args.disable or [], SWITCHES, "switch")
    config = config_of(args.model)
    if not args.list:  # which needs no GPU
        checked(args, {"tokens": 2})
        what = f"a prompt of {PROMPT} and --tokens {args.tokens}"
        check_fits(config, args.model, PROMPT + args.tokens, what)
    there = applicable(args.device, args.dtype, args.batch)
    if args.list:
        print(*(f"{name:<18} {SWITCHES[name].what}" for name in there), sep="\n")
        return
    wanted = there if args.disable is None else args.disable
    check_applies(wanted, there, args.device)
    settings = {"model": args.model, "prompt": PROMPT, "tokens": args.tokens}
    settings |= {"switches": {name: SWITCHES[name].what for name in wanted}}
    with Kept(args.out, settings, gpu=args.device != "cpu") as kept:
        for dtype in args.dtype:
            if reason := too_large(config, dtype, max(args.batch), args.device):
                kept.skip(f"{args.model} {dtype}", reason)
                continue
            model = random_model(config, dtype, args.device)
            for batch in args.batch:
                path = base(model, batch, wanted)
                every = applicable(args.device, [dtype], [batch])
                every = [name for name in every if path == "persistent" or name != "persistent"]
                here = [name for name in every if name in wanted]
                for off in combinations(here):
                    timing = speed(model, path, off, batch, args)
                    rate = 1e6 * batch / timing.median_us
                    row = {"dtype": dtype, "batch": batch, "off": ",".join(off)}
                    row |= {"decode": path, "only_cache": list(off) == every}
                    kept.rows.append(row | {"step": timing.as_dict(), "tokens_per_second": rate})
                    title = f"{dtype} batch {batch}, off: {', '.join(off) or 'nothing'}"
                    print(f"{title}: {rate:.0f} tokens/s", flush=True)
            del model


if __name__ == "__main__":
    main(run)
