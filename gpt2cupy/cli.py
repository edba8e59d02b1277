"""The command line: ``gpt2cupy generate``, ``info``, ``compile``, ``profile``, ``validate``."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from ._version import __version__
from .errors import Gpt2CupyError

app = typer.Typer(
    help="GPT-2 inference from hand-written CUDA kernels.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Option("--model", "-m", help="Name, hub id or folder.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]


def _version(show: bool) -> None:
    if show:
        print(f"gpt2cupy {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _shell_manners() -> Iterator[None]:
    """Errors of ours as one line and exit code 1; a broken pipe or Ctrl-C as shells expect."""
    try:
        yield
        sys.stdout.flush()
    except Gpt2CupyError as error:
        print(f"gpt2cupy: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    except BrokenPipeError:
        # The reader is gone: nothing more can be written, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")] = "",
    model: Model = "shakespeare",
    dtype: Dtype = "auto",
    device: Device = "auto",
    revision: Annotated[Optional[str], typer.Option(help="Revision of a hub id.")] = None,  # noqa: UP045
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[Optional[int], typer.Option(help="Same seed, same text.")] = None,  # noqa: UP045
    stop: Annotated[Optional[list[str]], typer.Option(help="End before this text.")] = None,  # noqa: UP045
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Nothing on stderr.")] = False,
) -> None:
    """Continue a prompt, writing text as it comes; what ran and how fast goes to stderr."""
    with _shell_manners():
        from .lm import load

        with load(model, dtype=dtype, device=device, revision=revision) as lm:
            if not quiet:
                print(f"{lm.name}, {lm.dtype} on {lm.device}", file=sys.stderr)
            print(prompt, end="", flush=True)
            piece, count = None, 0
            for piece in lm.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                min_p=min_p,
                seed=seed,
                stop=tuple(stop or ()),
            ):
                print(piece.text, end="", flush=True)
                count += 1
            print()
            if piece and not quiet:
                print(
                    f"{count} tokens ({piece.finish_reason}), first after "
                    f"{piece.prefill_seconds * 1e3:.1f} ms, then "
                    f"{piece.tokens_per_second:.0f} tokens/s",
                    file=sys.stderr,
                )


@app.command()
def info(model: Model = "shakespeare", dtype: Dtype = "auto", device: Device = "auto") -> None:
    """What would run here: versions, device, kernels, and the memory of a model."""
    with _shell_manners():
        from .info import report

        for name, value in report(model, dtype, device):
            print(f"{name:<16} {value}")


@app.command()
def compile(
    arch: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="sm_75, sm_80, ...; several times for several. Default: this GPU's."),
    ] = None,
) -> None:
    """Compile every kernel ahead of time into the cache; needs no GPU."""
    with _shell_manners():
        from tqdm import tqdm

        from .ops import compiler, launch

        if not arch:
            launch.cupy_module()
            arch = [launch.device_arch(launch.current_device())]
        jobs = [(*variant, name) for name in arch for variant in compiler.variants()]
        for source, defines, name in tqdm(jobs, unit="kernel", disable=None):
            compiler.cubin(source, defines, name)
        print(f"{len(jobs)} cubins for {', '.join(arch)} in {compiler.cache_dir()}")


@app.command()
def profile(
    model: Model = "shakespeare",
    dtype: Dtype = "auto",
    device: Device = "auto",
    prompt: Annotated[str, typer.Option(help="Text fed before the measured tokens.")] = (
        "What is your name"
    ),
    warmup: Annotated[int, typer.Option(help="Runs before measuring.")] = 20,
    runs: Annotated[int, typer.Option(help="Runs measured.")] = 20,
    tokens: Annotated[int, typer.Option(help="Tokens of a run.")] = 30,
    batch: Annotated[int, typer.Option(help="Rows with the same prompt.")] = 1,
    decode: Annotated[str, typer.Option(help="Path whose steps are profiled.")] = "eager",
    component: Annotated[Optional[str], typer.Option(help="Only this one's kernels.")] = None,  # noqa: UP045
    trace: Annotated[Optional[Path], typer.Option(help="Write a Chrome trace.")] = None,  # noqa: UP045
    plot: Annotated[Optional[Path], typer.Option(help="Draw roofline and bars.")] = None,  # noqa: UP045
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    cupti: Annotated[bool, typer.Option(help="Record kernels through CUPTI.")] = True,
) -> None:
    """Where the time of a decode step goes: by component, by kernel, and between kernels."""
    with _shell_manners():
        from .profile import Settings, command

        command.run(
            model,
            dtype,
            device,
            Settings(prompt, warmup, runs, tokens, batch, decode),
            only=component,
            trace_path=trace,
            plot_path=plot,
            as_json=json,
            cupti=cupti,
        )


@app.command()
def validate(
    name: Annotated[str, typer.Argument(metavar="[MODEL]", help="As --model.")] = "",
    model: Model = "shakespeare",
    steps: Annotated[int, typer.Option(help="Decode steps compared.")] = 128,
    batch: Annotated[int, typer.Option(help="Rows.")] = 2,
    prompt: Annotated[Optional[str], typer.Option(help="Instead of random ids.")] = None,  # noqa: UP045
    seed: Annotated[int, typer.Option(help="Of random ids, or of the continuation.")] = 0,
    dtype: Annotated[str, typer.Option(help="One dtype; auto is all the device has.")] = "auto",
    device: Device = "auto",
    path: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="Decode path beside eager; several times for several. Default: all."),
    ] = None,
    against: Annotated[str, typer.Option(help="float64, or hf for transformers.")] = "float64",
    reference: Annotated[Optional[str], typer.Option(help="Folder that hf loads.")] = None,  # noqa: UP045
    revision: Annotated[Optional[str], typer.Option(help="Revision of a hub id.")] = None,  # noqa: UP045
    json: Annotated[bool, typer.Option("--json", help="Every step as JSON.")] = False,
) -> None:
    """Check the numbers: cached against whole forward, all paths, float64 or transformers."""
    with _shell_manners():
        from .validate import command

        settings = command.Settings(
            name or model, steps, batch, prompt, seed, dtype, device, tuple(path or ()), against,
            reference, revision,
        )  # fmt: skip
        passed = command.run(settings, as_json=json)
    if not passed:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the ``gpt2cupy`` command."""
    app()


if __name__ == "__main__":
    main()
