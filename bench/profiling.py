"""Profiles of the decode step and of Hugging Face: the record behind docs/profiling.md.

    python bench/profiling.py [--model gpt2] [--dtype float32 float16]
                              [--decode eager graph persistent] [--out FILE]
    python bench/profiling.py --draw      the pictures of docs/ again, from the record

Random weights of a GPT-2's shape, the prompt "What is your name", 20 warm-up runs
and 20 runs of 30 tokens. The baseline runs in a process of its own, before ours,
where torch and transformers are installed (--no-peer leaves it out). What fails is left
out of the record, which then says that it is not complete; the exit code is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from arguments import check_fits, checked, chosen, main
from report.layout import device, read
from shared import DTYPES, config_of, paths, random_model

from gpt2cupy import GPT2, decode, output, record
from gpt2cupy.errors import InputError
from gpt2cupy.profile import Settings, equation_text, plot, profile, trace

# "What is your name" in GPT-2's tokens: random weights have no tokenizer.
PROMPT_IDS = [2061, 318, 534, 1438]
PICTURES = record.ROOT / "docs"
RECORD = record.RESULTS / "profile.json"


class Progress:
    """How far it came, on stderr, and what went wrong."""

    def __init__(self) -> None:
        self.began, self.wrong = time.perf_counter(), list[str]()

    def say(self, what: str) -> None:
        print(f"[{time.perf_counter() - self.began:6.1f} s] {what}", file=sys.stderr, flush=True)

    def fail(self, what: str) -> None:
        self.wrong.append(what)
        self.say(what)


def ours(
    args: argparse.Namespace, model: GPT2, settings: Settings, progress: Progress
) -> dict[str, Any]:
    name = f"{model.dtype}, {settings.decode}"
    prompt = np.array(PROMPT_IDS, np.int32) % model.config.vocab_size
    found = profile(model, prompt, settings, cupti=args.cupti)
    if found.error is not None:
        progress.fail(f"{name}: {found.error}")
    if args.trace:
        trace.write(found, args.trace / f"profile-{model.dtype}-{settings.decode}.json")
    progress.say(f"{name}: {equation_text(found.results['gaps'])}")
    if note := found.results["note"]:
        progress.say(f"{name}: {note}")
    return found.results


def peer(args: argparse.Namespace, dtype: str, settings: Settings) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "peer.json"
        options = {
            "model": args.model, "dtype": dtype, "device": args.device, "out": out,
            "warmup": settings.warmup, "runs": settings.runs, "tokens": settings.tokens,
        }  # fmt: skip
        script = Path(__file__).parent / "peers" / "profile_hf.py"
        words = [str(word) for key, value in options.items() for word in (f"--{key}", value)]
        subprocess.run([sys.executable, script, "--random", *words], check=True)
        return json.loads(out.read_text())["results"]


def draw(results: dict[str, Any], device: str, record_at: Path) -> None:
    """A picture for each dtype; left out, saying so, without matplotlib.

    Those of the documents' record go to docs/, of any other beside it.
    """
    folder = PICTURES if record_at.resolve() == RECORD else record_at.parent
    try:
        plot.matplotlib_figure()
    except InputError as error:
        print(error)
        return
    for each in results["ours"]:
        path = folder / f"profiling-{each['dtype']}.png"
        plot.draw(each | {"model": results["model"], "device": device}, path)
        print(path)


def run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="whose shape; tiny is for trying")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"])
    parser.add_argument("--decode", nargs="+", help="decode paths; all by default")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--no-cupti", dest="cupti", action="store_false")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--trace", type=Path, help="folder for a trace of each dtype")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--draw", action="store_true", help="only draw the record's pictures")
    args = parser.parse_args()
    if args.draw:
        entry = read(args.out)
        draw(entry["results"], device(entry), args.out)
        return
    config = config_of(args.model)
    chosen(args.dtype, DTYPES, "dtype")
    checked(args, {"warmup": 0})
    what = f"a prompt of {len(PROMPT_IDS)} and --tokens {args.tokens}"
    check_fits(config, args.model, len(PROMPT_IDS) + args.tokens, what)
    if args.trace:
        with output.file_errors(args.trace, "traces"):
            args.trace.mkdir(parents=True, exist_ok=True)
    settings = Settings(warmup=args.warmup, runs=args.runs, tokens=args.tokens)
    on_gpu = args.device != "cpu"
    known = paths(args.device)
    args.decode = chosen(args.decode or known, known, "decode path")
    if "eager" not in args.decode:
        raise InputError(
            "eager is what the others stand beside", where="--decode", remedy="Name it too."
        )
    progress = Progress()
    results: dict[str, Any] = {"model": args.model, "weights": "random"}
    results |= {"ours": [], "paths": [], "peers": []}
    if not args.peer:
        progress.fail("Hugging Face is left out: --no-peer")
    elif not all(importlib.util.find_spec(each) for each in ("torch", "transformers")):
        progress.fail("Hugging Face is left out: torch or transformers is not installed")
    else:
        try:
            results["peers"].append(peer(args, args.dtype[0], settings))
            progress.say("Hugging Face: measured")
        except subprocess.CalledProcessError as error:
            progress.fail(f"Hugging Face is left out: exit status {error.returncode}")
    measured = False
    try:
        for dtype in args.dtype:
            model = random_model(config, dtype, args.device)
            there = decode.usable(model, settings.batch)
            for name in args.decode:
                if name not in there:
                    why = decode.why_not(model, settings.batch)
                    progress.say(f"{dtype}: {name} is left out: {why}")
                    continue
                where = "ours" if name == "eager" else "paths"
                each = dataclasses.replace(settings, decode=name)
                results[where].append(ours(args, model, each, progress))
        measured = True
    finally:
        if results["ours"]:  # what was measured is kept
            complete = measured and not progress.wrong
            entry = record.write(args.out, results, gpu=on_gpu, complete=complete)
            draw(results, device(entry), args.out)
    progress.say("done")
    # Leaving the peer out was asked for.
    sys.exit(1 if any("--no-peer" not in each for each in progress.wrong) else 0)


if __name__ == "__main__":
    main(run)
