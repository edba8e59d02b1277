"""``gpt2cupy serve``."""

from __future__ import annotations

from typing import Annotated

import typer

from ..errors import InputError
from . import options
from .generate import Gemv


def serve(
    model: options.Model = "shakespeare",
    served_name: Annotated[
        str | None,
        typer.Option("--served-name", help="Name of the model in requests; by default --model."),
    ] = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
    variant: options.Variant = None,
    adapter: options.Adapter = None,
    tokenizer: options.Tokenizer = None,
    gemv: Annotated[
        Gemv | None,
        typer.Option(help="Backend of GEMV, and of GEMM with few rows, on the GPU."),
    ] = None,
    decode: Annotated[
        str, typer.Option(help="How a step is run: auto, eager, graph or persistent.")
    ] = "auto",
    batch_invariant: options.BatchInvariant = False,
    slots: Annotated[
        int,
        typer.Option(
            callback=options.within(0), help="Texts generated at once; 0 is 256, on the CPU 16."
        ),
    ] = 0,
    context: Annotated[
        int,
        typer.Option(
            callback=options.within(0), help="Tokens of prompt and text; 0 is the model's context."
        ),
    ] = 0,
    no_prefix_cache: Annotated[
        bool,
        typer.Option(
            "--no-prefix-cache", help="Run every prompt whole, also where a slot has its beginning."
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(callback=options.within(0, 65535), help="0 takes a free one.")
    ] = 8000,
    workers: Annotated[
        int, typer.Option(callback=options.within(1, 64), help="Processes that speak HTTP.")
    ] = 1,
    coalesce: Annotated[
        float,
        typer.Option(
            callback=options.within(0, 5),
            help="Milliseconds in which tokens of a text share an event.",
        ),
    ] = 0.0,
    event_tokens: Annotated[
        int,
        typer.Option(
            callback=options.within(0), help="Tokens of an event at most; 0 is any number."
        ),
    ] = 0,
    api_key_file: Annotated[
        str | None, typer.Option(help="File of keys, one a line, one of which a request needs.")
    ] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="File with a template for /v1/chat/completions.")
    ] = None,
    max_body: Annotated[
        int, typer.Option(callback=options.within(1), help="Bytes of a request's body.")
    ] = 4 << 20,
    max_choices: Annotated[
        int, typer.Option(callback=options.within(1), help="Prompts of a request times n.")
    ] = 1024,
    max_waiting: Annotated[
        int,
        typer.Option(
            callback=options.within(1), help="Texts that may wait for a slot; then 429 is answered."
        ),
    ] = 16384,
    request_timeout: Annotated[
        float,
        typer.Option(
            callback=options.within(0.001), help="Seconds after which a request is given up."
        ),
    ] = 600.0,
    receive_timeout: Annotated[
        float,
        typer.Option(
            callback=options.within(0.001), help="Seconds in which a request has to arrive."
        ),
    ] = 30.0,
    slow_reader_timeout: Annotated[
        float,
        typer.Option(
            callback=options.within(0.001), help="Seconds for a reader that takes nothing."
        ),
    ] = 30.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            callback=options.within(0), help="Seconds after SIGTERM to answer what was accepted."
        ),
    ] = 60.0,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Prompts in the log too.")
    ] = False,
    engine: Annotated[
        str, typer.Option(hidden=True, help="For tests: mock:STEPS_A_SECOND or FILE.py:FUNCTION.")
    ] = "",
    quiet: options.Quiet = False,
) -> None:
    """Serve a model over HTTP, as OpenAI's API and vLLM have it; SIGTERM or Ctrl-C ends it.

    Each request is a line of JSON on stderr. docs/serving.md has the details.
    """
    if not host:  # which sockets take for all addresses
        raise typer.BadParameter("--host is empty; for all addresses give 0.0.0.0 or ::")
    try:
        from ..server.settings import Settings
        from ..server.supervisor import Supervisor
    except ModuleNotFoundError as error:
        raise InputError(
            f"the server needs the package {error.name}",
            where="serve",
            remedy='Install the extra: pip install "gpt2cupy[serve]".',
        ) from error
    settings = Settings(
        model=model, served_name=served_name or "", dtype=dtype, device=device, revision=revision,
        variant=variant, adapter=adapter, tokenizer=tokenizer,
        quantize=options.name_of(quantize), gemv=options.name_of(gemv), decode=decode,
        batch_invariant=batch_invariant, slots=slots, capacity=context,
        prefix_cache=not no_prefix_cache, host=host, port=port,
        workers=workers, coalesce=coalesce / 1e3, event_tokens=event_tokens,
        api_key_file=api_key_file, chat_template=chat_template, max_body=max_body,
        max_choices=max_choices, max_waiting=max_waiting, request_seconds=request_timeout,
        receive_seconds=receive_timeout, slow_reader_seconds=slow_reader_timeout,
        drain_seconds=drain_timeout, log_prompts=log_prompts, quiet=quiet, engine=engine,
    )  # fmt: skip
    Supervisor(settings).run()
