"""Look-up speculation: tokens per second of one text that repeats itself, and of one that does not.

    python bench/speculation.py [--model 124M,1558M] [--dtype float16] [--prompt 257]
                                [--tokens 200] [--runs 7] [--out FILE]

Each text is run by an engine of one slot with and without speculate="ngram", in turn, by the clock
on the wall from the request to its last token. Greedy texts of random weights soon repeat
themselves: a prompt is what one of them has said so far, and of some texts the one is taken of
which most drafts are accepted. A logit bias makes a text of one token: every draft is accepted, and
it is the most that speculation gives. Sampled at a temperature of 1 texts do not repeat themselves;
of some seeds one is taken without a single accepted draft. Where a text differs with speculation,
the record has the first place, and how far apart the logits of the two tokens are there.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from arguments import check_fits, chosen, main, names, parsed, parser
from shared import DTYPES, Kept, config_of, prompts, random_model

from gpt2cupy import GPT2, SamplingParams
from gpt2cupy.errors import Gpt2CupyError
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.generation.results import Finished
from gpt2cupy.timing import Timing
from gpt2cupy.validate.rule import one_ulp

SEEDS = 20  # in which a text without an accepted draft is looked for
TEXTS = 5  # of which the one that repeats itself most is taken
BEGUN = 16  # tokens of its prompt that are random
BIASED = 11  # any token


def text(engine: Engine, ids: np.ndarray, **options: Any) -> tuple[float, Finished]:
    """Seconds that a text took, and what it came to."""
    params = SamplingParams(eos_token_id=-1, **options)
    start = time.perf_counter()
    done: list[Finished] = []
    for block in engine.blocks([Request("text", ids, params)]):
        if block.finished:
            seconds = time.perf_counter() - start
            done += block.finished
    if engine.model.xp is not np:
        engine.stream.synchronize()  # what was queued ahead
    return seconds, done[0]


def measure(engine: Engine, ids: np.ndarray, runs: int, **options: Any) -> dict[str, Any]:
    times: dict[str, list[float]] = {"without": [], "with": []}
    found: dict[str, Finished] = {}
    for turn in range(runs + 2):
        for name, how in (("without", None), ("with", "ngram")):
            seconds, found[name] = text(engine, ids, speculate=how, **options)
            if turn > 1:
                times[name].append(seconds)
    row: dict[str, Any] = {name: Timing.of(each).as_dict() for name, each in times.items()}
    row["tokens"] = len(found["with"].ids)
    row["speed_up"] = row["without"]["median_us"] / row["with"]["median_us"]
    row |= {"drafted": found["with"].drafted, "accepted": found["with"].accepted}
    row["same_tokens"] = found["with"].ids.tolist() == found["without"].ids.tolist()
    if not row["same_tokens"] and not options.get("logit_bias"):
        row["difference"] = difference(engine.model, ids, *(found[name].ids for name in times))
    row["distinct"] = len(set(found["with"].ids.tolist()))
    return row


def difference(model: GPT2, ids: np.ndarray, *texts: np.ndarray) -> dict[str, Any]:
    """Where two texts begin to differ, and the logits of both tokens there.

    They are those of a third way, the whole text at once: ``gap`` is what one token is ahead of the
    other, ``ulp`` the distance of two numbers of the dtype at their size, and ``ahead`` by how
    much both are ahead of the best of the rest.
    """
    place = next(i for i, pair in enumerate(zip(*texts, strict=False)) if pair[0] != pair[1])
    both = [int(each[place]) for each in texts]
    logits = model(np.concatenate([ids, texts[0][:place]])[None])[0, -1]
    logits = np.array(logits.tolist())
    rest = np.delete(logits, both).max()
    return {
        "place": place,
        "gap": float(logits[both[0]] - logits[both[1]]),
        "ulp": one_ulp(float(np.abs(logits[both]).max()), model.dtype),
        "ahead": float(logits[both].min() - rest),
    }


def repeating(engine: Engine, args: Any) -> np.ndarray:
    """The beginning of a text that repeats itself."""
    found = []
    for start in prompts(engine.model.config, TEXTS, BEGUN):
        ids = np.array(start, np.int32)
        said = text(engine, ids, max_new_tokens=args.prompt - BEGUN)[1].ids
        ids = np.concatenate([ids, said])
        done = text(engine, ids, max_new_tokens=args.tokens, speculate="ngram")[1]
        found.append((done.accepted, len(found), ids))
    return max(found)[2]


def new_options(engine: Engine, ids: np.ndarray, tokens: int) -> dict[str, Any]:
    """Options of a text without an accepted draft."""
    for seed in range(SEEDS):
        options = {"temperature": 1.0, "seed": seed, "max_new_tokens": tokens}
        if not text(engine, ids, speculate="ngram", **options)[1].accepted:
            return options
    raise Gpt2CupyError(
        f"each of {SEEDS} seeds had an accepted draft", where="speculation", remedy="Try a model."
    )


def run() -> None:
    options = parser(__doc__, "speculation.json")
    options.add_argument("--model", type=names, default=["124M", "1558M"])
    options.add_argument("--dtype", default="float16")
    options.add_argument("--prompt", type=int, default=257)
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--runs", type=int, default=7)
    args = parsed(options, {"tokens": 2, "prompt": BEGUN + 1})
    chosen([args.dtype], DTYPES, "dtype")
    settings = {"dtype": args.dtype, "weights": "random", "prompt": args.prompt}
    with Kept(args.out, settings, gpu=args.device != "cpu") as kept:
        for name in args.model:
            config = config_of(name)
            check_fits(config, name, args.prompt + args.tokens, "--prompt and --tokens")
            model: GPT2 = random_model(config, args.dtype, args.device)
            engine = Engine(model, 1)
            random = np.array(prompts(config, 1, args.prompt)[0], np.int32)
            kinds: dict[str, tuple[np.ndarray, dict[str, Any]]] = {
                "repeats": (repeating(engine, args), {"max_new_tokens": args.tokens}),
                "one token": (
                    np.append(random, [BIASED] * 8).astype(np.int32)[-args.prompt :],
                    {"max_new_tokens": args.tokens, "logit_bias": {BIASED: 1e4}},
                ),
                "new": (random, new_options(engine, random, args.tokens)),
            }
            for kind, (ids, given) in kinds.items():
                row = {"model": name, "kind": kind} | measure(engine, ids, args.runs, **given)
                kept.rows.append(row)
                rates = [1e6 * row["tokens"] / row[how]["median_us"] for how in ("without", "with")]
                print(
                    f"{name} {kind}: {rates[0]:.0f} tokens/s without, {rates[1]:.0f} with "
                    f"({row['speed_up']:.3f}), {row['accepted']} of {row['drafted']} accepted, "
                    f"same tokens: {row['same_tokens']}",
                    flush=True,
                )
            del engine, model


if __name__ == "__main__":
    main(run)
