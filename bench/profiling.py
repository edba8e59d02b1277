"""Profiles of the decode step and of Hugging Face: the record behind docs/profiling.md.

    python bench/profiling.py [--model gpt2] [--dtype float32 float16] [--out FILE]
    python bench/profiling.py --draw      the pictures of docs/ again, from the record

Random weights of a GPT-2's shape, the prompt "What is your name", 20 warm-up runs
and 20 runs of 30 tokens. The baseline runs in a process of its own, before ours,
where torch and transformers are installed (--no-peer leaves it out).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2cupy import GPT2, GPT2Config, record
from gpt2cupy.errors import InputError
from gpt2cupy.profile import Settings, equation_text, plot, profile, trace

# "What is your name" in GPT-2's tokens: random weights have no tokenizer.
PROMPT_IDS = [2061, 318, 534, 1438]
PICTURES = record.ROOT / "docs"


def ours(args: argparse.Namespace, dtype: str, settings: Settings) -> dict[str, Any]:
    config = GPT2Config.from_name(args.model)
    model = GPT2.random(config, 0, dtype=dtype, device=args.device)
    name = f"{dtype}, {settings.decode}"
    found = profile(model, np.array(PROMPT_IDS, np.int32), settings, cupti=args.cupti)
    if found.error is not None:
        raise found.error
    if args.trace:
        trace.write(found, args.trace / f"profile-{dtype}-{settings.decode}.json")
    print(f"{name}: {equation_text(found.results['gaps'])}", flush=True)
    if note := found.results["note"]:
        print(f"{name}: {note}", flush=True)
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


def draw(results: dict[str, Any], device: str) -> None:
    """A picture for each dtype; left out, saying so, without matplotlib."""
    try:
        plot.matplotlib_figure()
    except InputError as error:
        print(error)
        return
    for each in results["ours"]:
        path = PICTURES / f"profiling-{each['dtype']}.png"
        plot.draw(each | {"model": results["model"], "device": device}, path)
        print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="gpt2", help="whose shape")
    parser.add_argument("--dtype", nargs="+", default=["float32", "float16"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--no-cupti", dest="cupti", action="store_false")
    parser.add_argument("--no-peer", dest="peer", action="store_false")
    parser.add_argument("--trace", type=Path, help="folder for a trace of each dtype")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "profile.json")
    parser.add_argument("--draw", action="store_true", help="only draw the record's pictures")
    args = parser.parse_args()
    if args.draw:
        entry = json.loads(args.out.read_text())
        draw(entry["results"], entry["environment"].get("gpu") or entry["environment"]["cpu"])
        return
    if args.trace:
        args.trace.mkdir(parents=True, exist_ok=True)
    settings = Settings(warmup=args.warmup, runs=args.runs, tokens=args.tokens)
    peers = []
    if args.peer and all(importlib.util.find_spec(each) for each in ("torch", "transformers")):
        peers.append(peer(args, args.dtype[0], settings))
    elif args.peer:
        print("Hugging Face is left out: torch or transformers is not installed")
    others = [] if args.device == "cpu" else [dataclasses.replace(settings, decode="graph")]
    results = {
        "model": args.model,
        "weights": "random",
        "ours": [ours(args, dtype, settings) for dtype in args.dtype],
        "paths": [ours(args, dtype, other) for dtype in args.dtype for other in others],
        "peers": peers,
    }
    entry = record.write(args.out, results, gpu=args.device != "cpu")
    draw(results, entry["environment"].get("gpu") or entry["environment"]["cpu"])


if __name__ == "__main__":
    main()
