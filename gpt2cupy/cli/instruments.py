"""``gpt2cupy profile`` and ``gpt2cupy validate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options, progress


def profile(
    model: options.Model = "shakespeare",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    adapter: options.Adapter = None,
    tokenizer: options.Tokenizer = None,
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="Text fed before the measured tokens.")
    ] = ("What is your name"),
    warmup: Annotated[int, typer.Option(help="Runs before measuring.")] = 20,
    runs: Annotated[int, typer.Option(help="Runs measured.")] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens of a run.")] = 30,
    batch: Annotated[int, typer.Option(help="Rows with the same prompt.")] = 1,
    decode: Annotated[
        str, typer.Option(help="Path of the steps: eager, graph, persistent.")
    ] = "eager",
    component: Annotated[str | None, typer.Option(help="Only this one's kernels.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw roofline and bars.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    cupti: Annotated[bool, typer.Option(help="Record kernels through CUPTI.")] = True,
) -> None:
    """Where the time of a decode step goes: by component, by kernel, and between kernels."""
    from ..profile import Settings
    from . import profiling

    with progress.compiling():
        profiling.run(
            model,
            dtype,
            device,
            Settings(prompt, warmup, runs, tokens, batch, decode),
            only=component,
            trace_path=trace,
            plot_path=plot,
            as_json=as_json,
            cupti=cupti,
            quantize=options.name_of(quantize),
            revision=revision,
            variant=variant,
            adapter=adapter,
            tokenizer=tokenizer,
        )


def validate(
    name: Annotated[str | None, typer.Argument(metavar="MODEL", help="As --model.")] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Name, hub id or folder.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(help="Decode steps compared; by default 128, or what fits the context."),
    ] = None,
    batch: Annotated[int, typer.Option(help="Rows.")] = 2,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Instead of random ids.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of random ids, or of the continuation.")] = 0,
    dtype: Annotated[str, typer.Option(help="One dtype; auto is all the device has.")] = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    batch_invariant: options.BatchInvariant = False,
    path: Annotated[
        list[str] | None,
        typer.Option(
            metavar="<str>",
            help="Decode path beside eager (graph, persistent), repeatable. Default: all.",
        ),
    ] = None,
    against: Annotated[str, typer.Option(help="float64, or hf for transformers.")] = "float64",
    reference: Annotated[str | None, typer.Option(help="Folder that hf loads.")] = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    adapter: options.Adapter = None,
    as_json: Annotated[bool, typer.Option("--json", help="Every step as JSON.")] = False,
) -> None:
    """Check the numbers: cached against whole forward, all paths, float64 or transformers."""
    if name is not None and model is not None:
        raise typer.BadParameter("give the model once, with --model or without")
    from . import validation

    settings = validation.Settings(
        name or model or "shakespeare", steps, batch, prompt, seed, dtype, device,
        tuple(path or ()), against, reference, revision, options.name_of(quantize),
        batch_invariant, variant, adapter,
    )  # fmt: skip
    with progress.compiling():
        passed = validation.run(settings, as_json=as_json)
    if not passed:
        raise typer.Exit(1)
