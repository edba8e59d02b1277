"""Process start to first token, with warm caches: a fresh process each time.

    python bench/startup.py [--runs 5] [--device cuda] [--out FILE]

Writes a 124M checkpoint of random weights in fp16 to a temporary folder, then
starts `gpt2cupy generate` on it and stops the clock at the first byte after the
prompt. The first run fills the kernel cache and is given apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from gpt2cupy import GPT2Config, record
from gpt2cupy.checkpoint.layout import LAYER, PREFIX, WHOLE
from gpt2cupy.timing import Timing
from gpt2cupy.tokenizer import BYTE_SYMBOLS, END_OF_TEXT
from gpt2cupy.weights import Weights

PROMPT = "To be, or not to be, that is the question"


def write_checkpoint(folder: Path) -> None:
    """A 124M checkpoint of random fp16 weights, with a tokenizer of its size."""
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
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    # 256 bytes, 50,000 pairs of them and end-of-text: a vocabulary of GPT-2's size.
    symbols = sorted(BYTE_SYMBOLS, key=BYTE_SYMBOLS.__getitem__)
    pairs = [(a, b) for a in symbols for b in symbols][:50000]
    tokens = [*symbols, *(a + b for a, b in pairs), END_OF_TEXT]
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(f"{a} {b}" for a, b in pairs))


def first_token(folder: Path, device: str) -> float:
    """Seconds from starting the command to the first byte after the prompt."""
    command = [sys.executable, "-m", "gpt2cupy.cli", "generate", PROMPT, "--quiet"]
    command += ["--model", str(folder), "--device", device, "--max-new-tokens", "8"]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    seen = process.stdout.read(len(PROMPT) + 1)
    seconds = time.perf_counter() - start
    process.stdout.read()
    if process.wait() or len(seen) <= len(PROMPT):
        sys.exit("the command failed or wrote nothing")
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
