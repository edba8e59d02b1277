"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from .._version import __version__
from . import generate, instruments, machine, shell, text

app = typer.Typer(
    help="GPT-2 inference from hand-written CUDA kernels.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@shell.with_manners
def _version(show: bool) -> None:
    if show:
        shell.write(f"gpt2cupy {__version__}\n")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


for command in (
    generate.generate,
    text.score,
    text.tokenize,
    machine.info,
    machine.compile,
    instruments.profile,
    instruments.validate,
):
    app.command()(shell.with_manners(command))
