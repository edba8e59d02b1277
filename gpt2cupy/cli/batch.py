"""``gpt2cupy batch``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options, progress, shell


def batch(
    requests: Annotated[
        Path, typer.Argument(help="File of requests, one JSON object a line.", metavar="IN.JSONL")
    ],
    answers: Annotated[
        Path,
        typer.Argument(
            help="File of answers; an incomplete one is continued.", metavar="OUT.JSONL"
        ),
    ],
    model: options.Model = "shakespeare",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    adapter: options.Adapter = None,
    tokenizer: options.Tokenizer = None,
    batch_invariant: options.BatchInvariant = False,
    max_batch: Annotated[
        int | None,
        typer.Option(
            help="Texts at once; by default 16 on the CPU, on a GPU as many as fit, up to 256."
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Answer a file of completion requests in OpenAI's batch format.

    A line of the first file is {"custom_id": ..., "method": "POST", "url": "/v1/completions",
    "body": {...}}; a line of the second has its custom_id, its response and its error. Answers
    are written as they come. A batch that was stopped or killed goes on where it was when the
    same command is given again. docs/batch.md has the fields of a body.
    """  # fmt: skip
    if "-" in (str(requests), str(answers)):
        raise typer.BadParameter('"-" is no file here: requests and answers are read again')
    if quiet:
        shell.silence_warnings()

    from ..lm import load

    lm = load(
        model, dtype=dtype, device=device, revision=revision, variant=variant, adapter=adapter,
        tokenizer=tokenizer, batch_invariant=batch_invariant, quantize=options.name_of(quantize),
    )  # fmt: skip
    with lm, progress.compiling(quiet=quiet):
        shell.say_model(lm, quantized=quantize is not None, quiet=quiet)
        found = lm.batch(requests, answers, max_batch=max_batch, progress=False if quiet else None)
        answered = found.requests - found.before
        line = f"{answered} of {found.requests} requests answered in {found.seconds:.2f} s"
        if found.seconds:
            line += f", {found.completion_tokens / found.seconds:.0f} tokens/s"
        line += f"; {found.before} were answered before" if found.before else ""
        shell.say(shell.paint(line, shell.DIM), quiet=quiet)
        if found.ignored:
            names = ", ".join(sorted(found.ignored))
            shell.say(f"gpt2cupy: warning: fields without a meaning here: {names}", quiet=quiet)
        if found.failed:
            several = "answers are errors, each" if found.failed > 1 else "answer is an error,"
            shell.say(f"gpt2cupy: {found.failed} {several} in its line")
