"""Process start to first token, with an empty kernel cache and with a full one; compile.

    python bench/startup.py [--model 124M] [--dtype float16] [--runs 5] [--out FILE]

Writes a checkpoint of random weights to a temporary folder, then starts `gpt2cupy
generate` on it and stops the clock at the first byte after the prompt, each time in
a process of its own: with a kernel cache that is empty, where the kernels of the run
are compiled and its decode path is chosen, and with one that earlier runs have filled.
On a GPU `gpt2cupy compile` is timed too, into an empty cache, on all cores.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import traced
from arguments import chosen, main, parsed, parser
from shared import DTYPES, config_of, write_checkpoint

from gpt2cupy import record
from gpt2cupy.timing import Timing

PROMPT = "To be, or not to be, that is the question"
COMMAND = [sys.executable, "-m", "gpt2cupy"]


def with_cache(folder: Path) -> dict[str, str]:
    """The environment of a process that keeps its kernels in ``folder``, and CUDA what it keeps."""
    return os.environ | {"GPT2CUPY_CACHE_DIR": str(folder), "CUDA_CACHE_PATH": f"{folder}/cuda"}


def arguments(model: Path, device: str) -> list[str]:
    options = ["--model", str(model), "--device", device, "--max-new-tokens", "8"]
    return ["generate", PROMPT, "--quiet", *options]


def first_token(model: Path, device: str, cache: Path) -> float:
    """Seconds from starting the command to the first byte after the prompt."""
    command = [*COMMAND, *arguments(model, device)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=with_cache(cache))
    assert process.stdout is not None
    seen = process.stdout.read(len(PROMPT) + 1)
    seconds = time.perf_counter() - start
    process.stdout.read()
    if process.wait() or len(seen) <= len(PROMPT):
        sys.exit("the command failed or wrote nothing")
    return seconds


def compile_all(cache: Path) -> dict[str, Any]:
    """Seconds of `gpt2cupy compile` for this GPU, and what it made on how many cores."""
    start = time.perf_counter()
    subprocess.run([*COMMAND, "compile"], env=with_cache(cache), stdout=sys.stderr, check=True)
    seconds = time.perf_counter() - start
    made = len(list(cache.glob("*.cubin")))
    return {"seconds": seconds, "cubins": made, "cores": len(os.sched_getaffinity(0))}


def run() -> None:
    options = parser(__doc__, "startup.json")
    options.add_argument("--model", default="124M", help="a size of GPT-2, or tiny")
    options.add_argument("--dtype", default="float16")
    options.add_argument("--runs", type=int, default=5)
    args = parsed(options)
    chosen([args.dtype], DTYPES, "dtype")
    on_gpu = args.device.startswith("cuda")
    results: dict[str, Any] = {"model": f"{args.model}, {args.dtype}, random"}
    results["device"] = args.device
    with tempfile.TemporaryDirectory() as name:
        model, caches = Path(name) / "model", [Path(name) / str(i) for i in range(args.runs)]
        write_checkpoint(model, config_of(args.model), args.dtype)
        first_token(model, args.device, caches[0])  # what the system keeps of files is there now
        empty = Timing.of([first_token(model, args.device, each / "empty") for each in caches])
        warm = Timing.of([first_token(model, args.device, caches[0]) for _ in caches])
        # What such a process loads; one more, so that the timed ones are as a user's.
        traced.run("gpt2cupy", *arguments(model, args.device), env=with_cache(caches[0]))
        print(f"empty cache {empty.median_us / 1e6:.2f} s, then {warm.median_us / 1e6:.2f} s")
        results |= {"first_s": empty.median_us / 1e6, "empty": empty.as_dict()}
        results["warm"] = warm.as_dict()
        if on_gpu:
            results["compile"] = compiled = compile_all(Path(name) / "all")
            print("gpt2cupy compile: {seconds:.1f} s, {cubins} on {cores} cores".format(**compiled))
    record.write(args.out, results, gpu=on_gpu)


if __name__ == "__main__":
    main(run)
