"""Save what a model computes, as digests, and compare it with what another version saved.

    python tools/save_bits.py before.json [--device cuda] [--model 124M,tiny]
    python tools/save_bits.py after.json --against before.json

Logits of prompts, and texts with their log-probabilities, over dtypes, batches and decode paths,
from random weights. A change that should keep every bit shows here whether it does. Where a digest
differs, the largest difference of some saved logits and the first different token are printed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))

from shared import config_of, paths, random_model

from gpt2cupy import GPT2, SamplingParams, decode
from gpt2cupy.generation.engine import Engine
from gpt2cupy.generation.request import Request
from gpt2cupy.validate.runs import host

SAMPLE = 64  # logits that are kept as numbers, spread over all
KINDS = {
    "greedy": SamplingParams(max_new_tokens=24),
    "drawn": SamplingParams(max_new_tokens=24, temperature=0.8, top_k=50, top_p=0.9, seed=5),
    "penalised": SamplingParams(
        max_new_tokens=24, temperature=1.0, seed=6, repetition_penalty=1.2, presence_penalty=0.1,
        logit_bias={3: 2.0},
    ),
}  # fmt: skip


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def ids_of(model: GPT2, batch: int, length: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.integers(0, model.config.vocab_size, (batch, length)).astype(np.int32)


def logits_rows(model: GPT2) -> Iterator[tuple[str, dict[str, Any]]]:
    """Logits of all positions of prompts."""
    for batch, length in ((1, 1), (1, 19), (3, 40), (1, 100)):
        flat = host(model(ids_of(model, batch, length))).reshape(-1)
        some = flat[:: max(len(flat) // SAMPLE, 1)][:SAMPLE]
        yield f"logits {batch}x{length}", {"digest": digest(flat), "some": some.tolist()}


def text_rows(model: GPT2, path: str, batches: list[int]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Texts of several requests at once, of different prompt lengths."""
    for batch in batches:
        if path not in decode.usable(model, batch):
            continue
        engine = Engine(model, batch, decode=path)
        prompts = [row[: 5 + 3 * i % 29] for i, row in enumerate(ids_of(model, batch, 34))]
        for kind, params in KINDS.items():
            requests = [Request(i, prompt, params) for i, prompt in enumerate(prompts)]
            found: dict[int, list[tuple[int, float]]] = {i: [] for i in range(batch)}
            for token in engine.run(requests):
                found[token.key].append((token.id, token.logprob))
            ids = [[token for token, _ in found[i]] for i in range(batch)]
            logprobs = np.array([logprob for i in range(batch) for _, logprob in found[i]])
            yield f"{path} batch {batch} {kind}", {"digest": digest(logprobs), "ids": ids}


def saved(args: argparse.Namespace) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    on_gpu = args.device != "cpu"
    kinds = [*args.dtype.split(","), *(["int8", "invariant"] if on_gpu else ["invariant"])]
    for size in args.model.split(","):
        for kind in kinds:
            dtype = kind if kind not in ("int8", "invariant") else args.dtype.split(",")[0]
            quantize = "int8" if kind == "int8" else None
            model = random_model(config_of(size), dtype, args.device, quantize)
            if kind == "invariant":
                model = GPT2(model.config, model.weights, batch_invariant=True)
            for name, row in logits_rows(model):
                rows[f"{size} {kind} {name}"] = row
            for path in paths(args.device):
                batches = [int(n) for n in args.batch.split(",")]
                for name, row in text_rows(model, path, batches):
                    rows[f"{size} {kind} {name}"] = row
            print(f"{size} {kind}: {len(rows)} rows", file=sys.stderr, flush=True)
    return rows


def differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in sorted(before.keys() | after.keys()):
        if name not in before or name not in after:
            yield f"{name}: only {'after' if name in after else 'before'}"
            continue
        old, new = before[name], after[name]
        if old == new:
            continue
        if "some" in old:
            off = np.abs(np.subtract(old["some"], new["some"])).max()
            yield f"{name}: other bits, at most {off:.2e} in {SAMPLE} logits"
        else:
            pairs = zip(old["ids"], new["ids"], strict=True)
            apart = [i for i, (a, b) in enumerate(pairs) if a != b]
            yield f"{name}: other log-probabilities; {len(apart)} of {len(old['ids'])} texts differ"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--against", type=Path, help="what another version saved")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="tiny,124M")
    parser.add_argument("--dtype", default="float16,bfloat16,float32")
    parser.add_argument("--batch", default="1,2,3,4,8,16,32,64")
    args = parser.parse_args()
    rows = saved(args)
    args.out.write_text(json.dumps(rows, indent=0) + "\n")
    if args.against is None:
        print(f"{len(rows)} rows saved")
        return 0
    found = list(differences(json.loads(args.against.read_text()), rows))
    print("\n".join(found))
    print(f"{len(found)} of {len(rows)} rows differ")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
