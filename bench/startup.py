"""Process start to first token, with warm caches: a fresh process each time.

    python bench/startup.py [--runs 5] [--device cuda] [--out FILE]

Writes a 124M checkpoint of random weights in fp16 to a temporary folder, then
starts `python -m gpt2cupy.cli generate` on it and stops the clock when the first
text arrives. The first run fills the kernel cache and is given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gpt2cupy import GPT2Config, record
from gpt2cupy.checkpoint.layout import LAYER, PREFIX, WHOLE
from gpt2cupy.checkpoint.resolve import EMBEDDED
from gpt2cupy.timing import Timing
from gpt2cupy.weights import Weights


def write_checkpoint(folder: Path) -> None:
    """A 124M checkpoint of random fp16 weights, with the embedded model's tokenizer."""
    config = GPT2Config.from_name("gpt2")
    weights = Weights.random(config, 0, np.float16)
    tensors = {PREFIX + key: getattr(weights, name) for key, name in WHOLE.items()}
    tensors[PREFIX + "wte.weight"] = weights.wte[: config.vocab_size]
    for layer in range(config.n_layer):
        for key, (name, transposed) in LAYER.items():
            array = getattr(weights, name)[layer].astype(np.float16)
            tensors[f"{PREFIX}h.{layer}.{key}"] = array.T if transposed else array
    save_file(
        {key: np.ascontiguousarray(array) for key, array in tensors.items()},
        folder / "model.safetensors",
    )
    # Ids beyond the small tokenizer have no text: bias cannot help, so end-of-text is its own.
    fields = config.to_dict() | {"eos_token_id": None}
    (folder / "config.json").write_text(json.dumps(fields))
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(EMBEDDED["shakespeare"] / name, folder / name)


_CHILD = """
import sys, time
import gpt2cupy
lm = gpt2cupy.load(sys.argv[1], device=sys.argv[2])
for token in lm._engine_for(1).run(lm._requests(["To be, or not to be"], gpt2cupy.SamplingParams())):
    print(token.id, flush=True)
    break
"""


def first_token(folder: Path, device: str) -> float:
    """Seconds from starting a process to its first token."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder), device], stdout=subprocess.PIPE, env=os.environ
    )
    assert process.stdout is not None
    if not process.stdout.readline():
        sys.exit("the child wrote nothing")
    seconds = time.perf_counter() - start
    process.stdout.close()
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=str(record.RESULTS / "startup.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name))
        cold = first_token(Path(name), args.device)
        times = [first_token(Path(name), args.device) for _ in range(args.runs)]
    timing = Timing.of(times)
    print(f"first run {cold:.2f} s, then {timing.median_us / 1e6:.2f} s (median of {args.runs})")
    results = {"model": "124M, float16, random", "device": args.device, "first_s": cold}
    results["warm"] = timing.as_dict()
    record.write(args.out, results, gpu=args.device.startswith("cuda"))


if __name__ == "__main__":
    main()
