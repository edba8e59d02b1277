"""The commands put together."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from .._version import __version__
from . import batch, generate, instruments, machine, serve, shell, text


class _FlagsAsFlags:
    """In help, a flag takes no value: typer would show the type of one."""

    def get_params(self, ctx: Any) -> Any:
        params = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
        return params


class _Command(_FlagsAsFlags, TyperCommand):
    """One of ours."""


class _Group(_FlagsAsFlags, TyperGroup):
    """All of them."""


def _paragraphs(command: Callable[..., None]) -> str:
    """A command's docstring, each paragraph in one line, which the terminal wraps."""
    text = inspect.cleandoc(command.__doc__ or "")
    return "\n\n".join(part.replace("\n", " ") for part in text.split("\n\n"))


app = typer.Typer(
    cls=_Group,
    help="GPT-2 inference from hand-written CUDA kernels.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
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
    batch.batch,
    serve.serve,
    text.score,
    text.tokenize,
    machine.info,
    machine.compile,
    instruments.profile,
    instruments.validate,
):
    app.command(cls=_Command, help=_paragraphs(command))(shell.with_manners(command))
