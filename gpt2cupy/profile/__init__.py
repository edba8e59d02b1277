"""Where the time of a decode step goes: by component, by kernel, and between kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from ..errors import DeviceError
from ..model import GPT2
from .components import component
from .events import nvtx_ranges
from .kernels import by_kernel
from .limits import limits
from .measure import Session, Settings
from .result import (
    Profile,
    component_tables,
    equation_text,
    joined,
    kernel_table,
    per_token,
    step_equation,
)
from .timeline import Timeline

__all__ = ["Profile", "Settings", "component", "equation_text", "profile"]


def profile(
    model: GPT2,
    prompt: np.ndarray,
    settings: Settings | None = None,
    *,
    component: str | None = None,
    cupti: bool = True,
) -> Profile:
    """Profile the decode steps that follow a prompt.

    Parameters
    ----------
    model : GPT2
    prompt : array of int32 [T]
        Its token ids.
    settings : Settings, optional
    component : str, optional
        Keep only this component's kernels in the table of kernels.
    cupti : bool
        Whether to record kernels through CUPTI, on a GPU where it is installed.

    Returns
    -------
    Profile
        With ``error`` set, and everything else measured, if another tool holds CUPTI.

    Raises
    ------
    InputError
        If prompt and tokens exceed the context.
    """
    settings = settings or Settings()
    session = Session(model, prompt, settings)
    with session.active():
        for _ in range(settings.warmup):
            session.unprofiled()
        session.by_op()
        plain, host, timed = [], [], []
        # In turn, so that a machine that grows busy slows both alike.
        ranges = nvtx_ranges()
        with _capture_range(session):
            for _ in range(settings.runs):
                with ranges("run"):
                    seconds, queueing = session.unprofiled()
                plain.append(seconds)
                host.append(queueing)
                with ranges("run, op by op"):
                    timed.append(session.by_op())
        reached = limits(model)
    steps, ops_timeline = np.array(plain), joined(timed)
    finest, note, error = ops_timeline, "", None
    if session.on_gpu:
        finest, note, error = _kernels(session, ops_timeline, cupti)
    unprofiled_us = float(np.median(steps)) * 1e6
    gaps = step_equation(finest, settings.tokens, unprofiled_us, float(np.median(host)) * 1e6)
    overhead = {"ops_percent": 100 * (ops_timeline.step_us / unprofiled_us - 1)}
    if finest is not ops_timeline:
        overhead["kernels_percent"] = 100 * (finest.step_us / unprofiled_us - 1)
    results = {
        "settings": asdict(settings) | {"prompt_tokens": len(prompt)},
        "decoder": session.decoder.name,
        "dtype": str(model.dtype),
        "component_timer": ops_timeline.source,
        "kernel_timer": finest.source,
        "note": note,
        "tables": component_tables(session.ops, ops_timeline, model.config.n_layer),
        "per_token": per_token(steps, settings.batch, session.ops, ops_timeline),
        "kernel_component": component,
        "kernels": kernel_table(session.ops, finest, reached, settings.tokens, component),
        "gaps": gaps,
        "overhead": overhead,
        "limits": asdict(reached),
    }
    return Profile(results, session.ops, finest, error)


def _kernels(
    session: Session, ops_timeline: Timeline, wanted: bool
) -> tuple[Timeline, str, Exception | None]:
    """The finest timeline, what to say about it, and what went wrong."""
    instead = "kernel times are CUDA events around each launch"
    if not wanted:
        return ops_timeline, f"{instead} (--no-cupti)", None
    try:
        timeline, lost = by_kernel(session, session.settings.runs)
    except ImportError as error:
        return ops_timeline, f"{instead}: {error}; install gpt2cupy[profile] for CUPTI", None
    except DeviceError as error:
        return ops_timeline, instead, error
    return timeline, f"{lost} runs were dropped, their records incomplete" if lost else "", None


@contextlib.contextmanager
def _capture_range(session: Session) -> Iterator[None]:
    """What ``nsys --capture-range=cudaProfilerApi`` records: the measured runs."""
    if not session.on_gpu:
        yield
        return
    control: Any = session.model.xp.cuda.profiler
    control.start()
    try:
        yield
    finally:
        session.synchronize()
        control.stop()
