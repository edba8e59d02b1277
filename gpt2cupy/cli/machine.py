"""``gpt2cupy info``, ``gpt2cupy compile`` and ``gpt2cupy profile``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from . import options, shell


def info(
    model: options.Model = "shakespeare",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    revision: options.Revision = None,
    kernels: Annotated[
        bool,
        typer.Option("--kernels", help="What each kernel of the model takes of the GPU."),
    ] = False,
    arch: Annotated[
        str | None,
        typer.Option(help="With --kernels: sm_75, sm_80, ...; needs no GPU. Default: this GPU's."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """What would run here: versions, device, kernels, and the memory of a model."""
    if arch is not None and not kernels:
        raise typer.BadParameter("--arch needs --kernels")
    if kernels:
        from .. import kernel_report

        rows = kernel_report.report(model, dtype, device, arch, revision=revision)
        if as_json:
            for row in rows:
                shell.write(json.dumps(row) + "\n")
        else:
            shell.write("".join(line + "\n" for line in kernel_report.table(rows)))
        return
    from .. import info as about

    facts = about.report(model, dtype, device, revision=revision)
    if as_json:
        shell.write(json.dumps(facts) + "\n")
    else:
        for label, text in about.lines(facts):
            shell.write(f"{label:<16} {text}\n")


def compile(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="sm_75, sm_80, ...; several times for several. Default: this GPU's."),
    ] = None,
) -> None:
    """Compile every kernel ahead of time into the cache; needs no GPU."""
    from tqdm import tqdm

    from ..ops import compiler, device

    if not arch:
        device.cupy_module()
        arch = [device.device_arch(device.current_device())]
    jobs = [(*variant, name) for name in arch for variant in compiler.variants()]
    for source, defines, name in tqdm(jobs, unit="kernel", disable=None):
        compiler.cubin(source, defines, name)
    shell.write(f"{len(jobs)} cubins for {', '.join(arch)} in {compiler.cache_dir()}\n")


def profile(
    model: options.Model = "shakespeare",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    prompt: Annotated[str, typer.Option(help="Text fed before the measured tokens.")] = (
        "What is your name"
    ),
    warmup: Annotated[int, typer.Option(help="Runs before measuring.")] = 20,
    runs: Annotated[int, typer.Option(help="Runs measured.")] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens of a run.")] = 30,
    batch: Annotated[int, typer.Option(help="Rows with the same prompt.")] = 1,
    component: Annotated[str | None, typer.Option(help="Only this one's kernels.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw roofline and bars.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    cupti: Annotated[bool, typer.Option(help="Record kernels through CUPTI.")] = True,
) -> None:
    """Where the time of a decode step goes: by component, by kernel, and between kernels."""
    from ..profile import Settings, command

    command.run(
        model,
        dtype,
        device,
        Settings(prompt, warmup, runs, tokens, batch),
        only=component,
        trace_path=trace,
        plot_path=plot,
        as_json=as_json,
        cupti=cupti,
    )
