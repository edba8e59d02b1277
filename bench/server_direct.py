"""One request after another through an Engine in this process: what a server is compared with.

Reads a job as JSON from stdin: ``settings`` (of the server), ``prompts`` (texts), ``tokens``,
``runs``. Writes JSON: seconds from a text to the first piece of its continuation's text and to the
last one, for each run, as ``times``; and what it loaded, as ``loaded``, for the record.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # a checkout needs no install

import numpy as np

from gpt2cupy import SamplingParams, record
from gpt2cupy.generation.request import Request
from gpt2cupy.server.engine_process import make_engine
from gpt2cupy.server.settings import Settings
from gpt2cupy.tokenizer import Tokenizer


def main() -> None:
    job = json.load(sys.stdin)
    settings = Settings(**job["settings"])
    engine, _ = make_engine(settings)
    tokenizer = Tokenizer.from_path(settings.model)
    params = SamplingParams(max_new_tokens=job["tokens"], temperature=1, seed=1)
    seconds = []
    for run in range(job["runs"] + 3):
        text = job["prompts"][run % len(job["prompts"])]
        start = time.perf_counter()
        prompt = np.array(tokenizer.encode(text), np.int32)
        stream, pieces = tokenizer.stream(), []
        first = 0.0
        for block in engine.blocks([Request(run, prompt, params, eos=-1)]):
            pieces += [stream.push(id_) for id_ in block.ids.tolist()]
            if pieces and not first:
                first = time.perf_counter() - start
        seconds.append((first, time.perf_counter() - start))
    # Speed depends on what runs in the fronts too.
    from gpt2cupy.server import front_process, worker

    assert front_process and worker
    print(json.dumps({"times": seconds[3:], "loaded": record.loaded()}))


if __name__ == "__main__":
    main()
