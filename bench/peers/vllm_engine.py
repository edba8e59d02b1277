"""vLLM's offline engine, compiled and captured as it does by default.

It tells no time per token: a run is one call for the first token and one for all of them, and
the difference is the steps'. Prefix caching is off, so that the second computes the prompt too.
"""

from __future__ import annotations

import os
import time
from typing import Any

from interface import Job, Run, serve

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # it ends with this process

from vllm import LLM, SamplingParams

MEMORY = 0.25  # of the GPU: the other engines stay on it


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    if job["device"] == "cpu":
        raise ValueError("vLLM is timed on a GPU")
    prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
    engine = LLM(
        model=job["folder"],
        dtype=job["dtype"],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        gpu_memory_utilization=MEMORY,
        max_model_len=len(job["prompts"][0]) + job["tokens"],
        max_num_seqs=len(prompts),
    )

    def generate(tokens: int) -> tuple[list[int], float]:
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        found = engine.generate(prompts, params, use_tqdm=False)
        return list(found[0].outputs[0].token_ids), time.perf_counter() - start

    def run(tokens: int) -> tuple[list[int], float, float, float]:
        _, first = generate(1)
        ids, whole = generate(tokens)
        return ids, 0.0, first, whole

    return run, {"timed": "a call of one token off a call of all"}


if __name__ == "__main__":
    serve(("vllm",), prepare)
