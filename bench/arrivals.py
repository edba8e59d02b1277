"""Prompts that arrive while other texts run: how long a running text waits for its next token.

    python bench/arrivals.py [--model 124M] [--dtype float16] [--texts 64] [--rate 200]
                             [--longest 1000] [--seconds 20] [--warm 2] [--out FILE]

--texts texts run in an engine that has as many slots again. Requests of 1 to --longest prompt
tokens, each with 8 new ones, are submitted at random moments, --rate a second. A gap is the
wall-clock time between two tokens of a running text as :meth:`Engine.step` returns them; each
text has its own. As in a server, graphs are captured before, and the garbage collector no more
looks at what lives then; gaps of the first --warm seconds are left out.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, parsed, parser
from shared import DTYPES, Kept, config_of, random_model

from gpt2cupy import SamplingParams
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.server.warm import warm_up

NEW_TOKENS = 8  # of a request that arrives
SHARES = (50, 99, 99.9)


def running(config: Any, texts: int) -> Iterator[Request]:
    """Texts that go on to the end of the context, one after another."""
    rng = np.random.default_rng(0)
    for number in itertools.count():
        length = int(rng.integers(8, 64))
        ids = rng.integers(0, config.vocab_size, length).astype(np.int32)
        # The first ones end at different moments, so that those after them begin so.
        most = config.n_positions - length
        tokens = most if number >= texts else int(rng.integers(most // 4, most))
        params = SamplingParams(
            max_new_tokens=tokens, temperature=0.8, seed=number, eos_token_id=-1
        )
        yield Request(("runs", number), ids, params)


def arrivals(config: Any, rate: float, longest: int) -> Iterator[tuple[float, Request]]:
    """Moments in seconds, and what arrives then."""
    rng, moment = np.random.default_rng(1), 0.0
    for number in itertools.count():
        moment += float(rng.exponential(1 / rate))
        length = int(rng.integers(1, longest + 1))
        ids = rng.integers(0, config.vocab_size, length).astype(np.int32)
        params = SamplingParams(max_new_tokens=NEW_TOKENS, eos_token_id=-1)
        yield moment, Request(("arrives", number), ids, params)


def measure(engine: Engine, args: Any, rate: float) -> dict[str, Any]:
    config = engine.model.config
    texts, coming = running(config, args.texts), arrivals(config, rate or 1.0, args.longest)
    moment, request = next(coming)
    since: dict[Any, float] = {}  # of each text that runs its last token
    gaps: list[float] = []
    firsts: dict[Any, float] = {}  # when each arrived
    waits: list[float] = []
    for _ in range(args.texts):
        engine.submit(next(texts))
    start = time.perf_counter()
    while (now := time.perf_counter() - start) < args.warm + args.seconds:
        while rate and moment <= now:
            firsts[engine.submit(request)] = now
            moment, request = next(coming)
        block = engine.step()
        now = time.perf_counter() - start
        for key in block.keys:
            if key[0] == "runs":
                if key in since and since[key] > args.warm:
                    gaps.append(now - since[key])
                since[key] = now
            elif key in firsts:
                waits.append(now - firsts.pop(key))
        for done in block.finished:
            if since.pop(done.request.key, None) is not None:
                engine.submit(next(texts))
    for key in [*since, *firsts]:
        engine.cancel(key)
    while not engine.idle:
        engine.step()
    row = {"rate": rate, "gaps": len(gaps), "arrived": len(waits)}
    row |= {f"p{share}_us": 1e6 * float(np.percentile(gaps, share)) for share in SHARES}
    row["max_us"] = 1e6 * max(gaps)
    if waits:
        row["first_token_us"] = {
            f"p{share}": 1e6 * float(np.percentile(waits, share)) for share in SHARES[:2]
        }
    return row


def run() -> None:
    options = parser(__doc__, "arrivals.json")
    options.add_argument("--model", default="124M")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--texts", type=int, default=64)
    options.add_argument("--rate", type=float, default=200)
    options.add_argument("--longest", type=int, default=1000)
    options.add_argument("--seconds", type=float, default=20)
    options.add_argument("--warm", type=float, default=2)
    args = parsed(options)
    chosen([args.dtype], DTYPES, "dtype")
    config = config_of(args.model)
    check_fits(config, args.model, args.longest + NEW_TOKENS, "--longest")
    names = "model", "dtype", "texts", "longest", "seconds"
    settings = {name: getattr(args, name) for name in names} | {"weights": "random"}
    with Kept(args.out, settings, gpu=args.device != "cpu") as kept:
        model = random_model(config, args.dtype, args.device)
        for rate in (0.0, args.rate):
            engine = Engine(model, 2 * args.texts)
            warm_up(engine)
            gc.collect()
            gc.freeze()
            row = measure(engine, args, rate)
            gc.unfreeze()
            kept.rows.append(row)
            shares = ", ".join(f"p{share} {row[f'p{share}_us'] / 1e3:.2f} ms" for share in SHARES)
            print(
                f"{rate:.0f} prompts a second: {shares}, max {row['max_us'] / 1e3:.2f} ms "
                f"({row['gaps']} gaps, {row['arrived']} arrived)",
                flush=True,
            )


if __name__ == "__main__":
    main(run)
