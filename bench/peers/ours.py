"""gpt2cupy as an engine of the comparison, through its public interface.

`LanguageModel.generate` gives no time for each token: a run is one call for the first token and
one for all of them, and the difference is the time of the steps. Options of a job: ``decode``,
``naive``; with the latter the forward pass is run once for each of ``lengths`` before anything
is timed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from interface import Job, Run, serve

import gpt2cupy
from gpt2cupy import GPT2
from gpt2cupy.decode import PromptRunner, decoder


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    lm = gpt2cupy.load(job["folder"], dtype=job["dtype"], device=job["device"])
    model, prompts = lm.model, [np.asarray(ids, np.int32) for ids in job["prompts"]]
    if job.get("naive"):
        run = _naive(model, prompts, job["tokens"], job.get("lengths", ()))
        return run, {"decode": "whole forward"}
    model.decode_path, batch = job["decode"], len(prompts)

    def generate(tokens: int) -> tuple[list[int], float]:
        start = time.perf_counter()
        done = lm.generate(
            job["prompts"], temperature=0, max_new_tokens=tokens, eos_token_id=-1, max_batch=batch
        )
        return list(done[0].tokens), time.perf_counter() - start

    def run(tokens: int) -> tuple[list[int], float, float, float]:
        _, first = generate(1)
        ids, whole = generate(tokens)
        return ids, 0.0, first, whole

    return run, {"decode": decoder(model, job["decode"], batch).name}


def _naive(model: GPT2, prompts: list[np.ndarray], most: int, lengths: Sequence[int]) -> Run:
    """The whole text through the forward pass for each token; nothing is kept between them.

    A graph is captured for each bucket of lengths when it is first met: ``lengths`` meet all
    of them before the run.
    """
    batch, xp = len(prompts), model.xp
    length = len(prompts[0]) + most
    cache, work = model.new_cache(batch, length), model.new_workspace(batch * length)
    runner = PromptRunner(model, cache, work)
    last_work = model.new_workspace(batch)
    logits = xp.empty((batch, model.config.padded_vocab_size), work.x.dtype)

    def forward(texts: list[np.ndarray]) -> np.ndarray:
        cache.reset()
        model.logits(runner.run(texts, range(batch))[:batch], last_work, logits)
        ids = logits[:, : model.config.vocab_size].argmax(axis=1).astype(np.int32)
        return ids if xp is np else ids.get()

    for each in lengths:
        forward([np.zeros(each, np.int32)] * batch)

    def run(tokens: int) -> tuple[list[int], float, float, float]:
        texts, times = list(prompts), [time.perf_counter()]
        for _ in range(tokens):
            ids = forward(texts)
            texts = [np.append(text, id_) for text, id_ in zip(texts, ids, strict=True)]
            times.append(time.perf_counter())
        return texts[0][len(prompts[0]) :].tolist(), times[0], times[1], times[-1]

    return run


if __name__ == "__main__":
    serve(("numpy",), prepare)
