"""Hugging Face transformers, not compiled.

Options of a job: ``attention`` (sdpa, eager), ``loop`` (generate, or a bare loop over the
cache), ``use_cache``, ``threads`` on the CPU; ``keep`` the model for the next job with the same
folder, and run the forward pass once for each of ``lengths`` before anything is timed; ``cudnn``
lets scaled dot product attention take cuDNN's kernels, which are prepared for each new length.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import torch
import transformers
from interface import Job, Run, serve


class Clock(transformers.generation.streamers.BaseStreamer):
    """The time at which generate() hands out each token; the first call brings the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(job: Job) -> Any:
    """The model of a job on its device, in its dtype."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    torch.backends.cuda.enable_cudnn_sdp(job.get("cudnn", True))
    of = job["folder"], job.get("attention", "sdpa"), job["dtype"], job["device"]
    return _kept(*of) if job.get("keep") else _load(*of)


def _load(folder: str, attention: str, dtype: str, device: str) -> Any:
    model = transformers.GPT2LMHeadModel.from_pretrained(
        folder, attn_implementation=attention, dtype=getattr(torch, dtype)
    )
    return model.to(device).eval()


_kept = functools.lru_cache(maxsize=1)(_load)


def generating(model: Any, job: Job, **options: Any) -> Run:
    """Greedy generate() as a run."""
    prompts = torch.tensor(job["prompts"], device=job["device"])
    mask = torch.ones_like(prompts)

    @torch.inference_mode()
    def run(tokens: int) -> tuple[list[int], float, float, float]:
        clock = Clock()
        found = model.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
            eos_token_id=None,
            **options,
        )
        ids = found[0, prompts.shape[1] :].tolist()
        return ids, clock.times[0], clock.times[1], clock.times[-1]

    return run


def looping(model: Any, job: Job) -> Run:
    """The forward pass called token by token, without generate()'s own work."""
    prompts = torch.tensor(job["prompts"], device=job["device"])

    @torch.inference_mode()
    def run(tokens: int) -> tuple[list[int], float, float, float]:
        ids, times = [], [time.perf_counter()]
        fed, past = prompts, None
        for _ in range(tokens):
            out = model(fed, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, fed = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
            ids.append(int(fed[0]))
            times.append(time.perf_counter())
        return ids, times[0], times[1], times[-1]

    return run


@torch.inference_mode()
def warm(model: Any, job: Job) -> None:
    """The forward pass of texts as long as they will be: libraries choose kernels by length."""
    for length in job.get("lengths", ()):
        ids = torch.zeros((len(job["prompts"]), length), dtype=torch.long, device=job["device"])
        model(ids, use_cache=False, logits_to_keep=1)


def prepare(job: Job) -> tuple[Run, dict[str, Any]]:
    model = load(job)
    warm(model, job)
    defaults = {"attention": "sdpa", "loop": "generate", "cudnn": True}
    about = {name: job.get(name, default) for name, default in defaults.items()}
    if about["loop"] == "loop":
        return looping(model, job), about
    return generating(model, job, use_cache=job.get("use_cache", True)), about


if __name__ == "__main__":
    serve(("torch", "transformers"), prepare)
