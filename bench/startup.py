"""Process start to first token, with warm caches: a fresh process each time.

    python bench/startup.py [--model 124M] [--dtype float16] [--runs 5] [--out FILE]

Writes a checkpoint of random weights to a temporary folder, then
starts `gpt2cupy generate` on it and stops the clock at the first byte after the
prompt. The first run fills the kernel cache and is given apart.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import traced
from arguments import chosen, main, parsed, parser
from shared import DTYPES, config_of, write_checkpoint

from gpt2cupy import record
from gpt2cupy.timing import Timing

PROMPT = "To be, or not to be, that is the question"


def arguments(folder: Path, device: str) -> list[str]:
    options = ["--model", str(folder), "--device", device, "--max-new-tokens", "8"]
    return ["generate", PROMPT, "--quiet", *options]


def first_token(folder: Path, device: str) -> float:
    """Seconds from starting the command to the first byte after the prompt."""
    command = [sys.executable, "-m", "gpt2cupy", *arguments(folder, device)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    seen = process.stdout.read(len(PROMPT) + 1)
    seconds = time.perf_counter() - start
    process.stdout.read()
    if process.wait() or len(seen) <= len(PROMPT):
        sys.exit("the command failed or wrote nothing")
    return seconds


def run() -> None:
    options = parser(__doc__, "startup.json")
    options.add_argument("--model", default="124M", help="a size of GPT-2, or tiny")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--runs", type=int, default=5)
    args = parsed(options)
    chosen([args.dtype], DTYPES, "dtype")
    config = config_of(args.model)
    with tempfile.TemporaryDirectory() as name:
        write_checkpoint(Path(name), config, args.dtype)
        cold = first_token(Path(name), args.device)
        times = [first_token(Path(name), args.device) for _ in range(args.runs)]
        # What such a process loads; one more, so that the timed ones are as a user's.
        traced.run("gpt2cupy", *arguments(Path(name), args.device))
    timing = Timing.of(times)
    print(f"first run {cold:.2f} s, then {timing.median_us / 1e6:.2f} s (median of {args.runs})")
    results = {"model": f"{args.model}, {args.dtype}, random", "device": args.device}
    results |= {"first_s": cold, "warm": timing.as_dict()}
    record.write(args.out, results, gpu=args.device.startswith("cuda"))


if __name__ == "__main__":
    main(run)
