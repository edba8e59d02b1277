"""llama.cpp's llama-bench, where it is on PATH, on a GGUF file of the same shape and dtype.

Options of a job: ``gguf``. A run is one call of the program: the prompt and the tokens as
two tests of one repetition, the tokens from an empty cache; loading is not in its figures.
It does one sequence only and does not say which ids it chose. llama.cpp's own
`convert_hf_to_gguf.py` makes the file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

from interface import Job, Run, serve


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    program = shutil.which("llama-bench")
    if program is None:
        raise FileNotFoundError("llama-bench is not on PATH")
    if not job["gguf"]:
        raise ValueError("no GGUF file of this shape is named (--gguf)")
    if len(job["prompts"]) != 1:
        raise ValueError("llama-bench decodes one sequence")
    prompt = len(job["prompts"][0])

    def run(tokens: int) -> tuple[list[int], float, float, float]:
        command = [program, "-m", job["gguf"], "-p", str(prompt), "-n", str(tokens - 1)]
        command += ["-r", "1", "-fa", "1", "-o", "json"]
        command += ["-ngl", "0" if job["device"] == "cpu" else "99"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        seconds = {
            "prompt": sum(test["avg_ns"] for test in found if test["n_gen"] == 0) / 1e9,
            "tokens": sum(test["avg_ns"] for test in found if test["n_gen"] > 0) / 1e9,
        }
        return [], 0.0, seconds["prompt"], seconds["prompt"] + seconds["tokens"]

    return run, {"program": program}


if __name__ == "__main__":
    serve((), prepare)
