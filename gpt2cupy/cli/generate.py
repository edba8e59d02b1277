"""``gpt2cupy generate``."""

from __future__ import annotations

import dataclasses
import enum
import json
import secrets
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from ..errors import InputError
from ..sampling import SamplingParams
from . import options, progress, shell

if TYPE_CHECKING:
    from ..lm import LanguageModel

DEFAULT_NEW_TOKENS = 200


Gemv = enum.Enum("Gemv", {"ours": "ours", "cublas": "cublas"})


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='Text to continue; "-" or a pipe reads stdin.')
    ] = None,
    file: options.File = None,
    model: options.Model = "shakespeare",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    gemv: Annotated[
        Gemv | None,
        typer.Option(help="Who multiplies few rows (tens, with clusters) on the GPU."),
    ] = None,
    decode: Annotated[
        str, typer.Option(help="How a step is run: auto, eager, graph or persistent.")
    ] = "auto",
    batch_invariant: options.BatchInvariant = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens to write at most; by default {DEFAULT_NEW_TOKENS}, or fewer where the "
            "context ends."
        ),
    ] = None,
    min_new_tokens: Annotated[int, typer.Option(help="No end-of-text before that many.")] = 0,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    presence_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; several times for several.")
    ] = None,
    eos_token_id: Annotated[
        int | None, typer.Option(help="Token that ends the text; -1 is none.")
    ] = None,
    n: Annotated[int, typer.Option(help="Continuations; number i uses seed + i.")] = 1,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: logprobs, and those of so many most probable tokens."),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a prompt, writing text as it comes; what ran and how fast goes to stderr.

    With --n the continuations are written when all are finished. With --json each
    is an object: prompt, text, prompt_ids, ids, finish_reason, index, seed, the
    logprobs asked for, and speeds.
    """
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs needs --json")
    if quiet:
        shell.silence_warnings()
    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=secrets.randbits(32) if seed is None else seed,
        stop=tuple(stop or ()),
        eos_token_id=eos_token_id,
        n=n,
        logprobs=logprobs,
    )
    if batch_invariant and gemv is not None:
        raise typer.BadParameter("give --gemv or --batch-invariant, not both")
    text = shell.read_text(prompt, file)

    from ..decode import decoder
    from ..lm import load

    lm = load(
        model, dtype=dtype, device=device, revision=revision, tokenizer=tokenizer,
        batch_invariant=batch_invariant, quantize=options.name_of(quantize),
    )  # fmt: skip
    with lm, progress.compiling(quiet=quiet):
        if gemv is not None:
            if lm.model.xp is np:
                raise InputError(
                    "--gemv is for a GPU, and this runs on the CPU",
                    where="--gemv",
                    remedy="Leave it out.",
                )
            lm.model.gemv = gemv.value
        if decode != "auto":
            decoder(lm.model, decode, n)  # refuses a path that is not there before text is written
        lm.model.decode_path = decode
        shell.say_model(lm, quantized=quantize is not None, quiet=quiet)
        if max_new_tokens is None:
            room = lm.config.n_positions + 1 - len(lm.encode(text))
            wanted = min(max(DEFAULT_NEW_TOKENS, min_new_tokens), room)
            if min_new_tokens <= room:  # else the error names what was typed
                params = dataclasses.replace(params, max_new_tokens=wanted)
        if as_json:
            for found in _objects(lm, text, params):
                shell.write(json.dumps(found) + "\n")
        elif n > 1:
            _several(lm, text, params, quiet)
        else:
            _stream(lm, text, params, quiet)


def _stream(lm: LanguageModel, prompt: str, params: SamplingParams, quiet: bool) -> None:
    """One continuation, as it comes."""
    pieces = lm.stream(prompt, params)  # refuses what cannot be, before anything is written
    piece, count = None, 0
    for piece in pieces:
        # The prompt comes with the first token: until then stderr may have its line.
        shell.write(piece.text if count else prompt + piece.text)
        count += 1
    shell.write("\n" if count else f"{prompt}\n")
    if piece:
        summary = (
            f"{count} tokens ({piece.finish_reason}), first after "
            f"{piece.prefill_seconds * 1e3:.1f} ms, then {piece.tokens_per_second:.0f} tokens/s"
        )
        shell.say(shell.paint(summary, shell.DIM), quiet=quiet)


def _several(lm: LanguageModel, prompt: str, params: SamplingParams, quiet: bool) -> None:
    """Several continuations, each under a heading on stderr."""
    start = time.perf_counter()
    found = lm.generate(prompt, params)
    seconds = time.perf_counter() - start
    for number, each in enumerate(found, 1):
        heading = f"[{number} of {params.n}: {len(each.tokens)} tokens ({each.finish_reason})]"
        shell.say(shell.paint(heading, shell.DIM), quiet=quiet)
        shell.write(f"{prompt}{each.text}\n")
    count = sum(len(each.tokens) for each in found)
    summary = f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s"
    shell.say(shell.paint(summary, shell.DIM), quiet=quiet)


def _objects(lm: LanguageModel, prompt: str, params: SamplingParams) -> Iterator[dict[str, Any]]:
    """What ``--json`` writes, one object per continuation."""
    ids = lm.encode(prompt).tolist()
    start = time.perf_counter()
    found = lm.generate(prompt, params)
    seconds = time.perf_counter() - start
    found = [found] if params.n == 1 else found
    count = sum(len(each.tokens) for each in found)
    assert params.seed is not None
    for index, each in enumerate(found):
        result = {
            "prompt": prompt,
            "text": each.text,
            "prompt_ids": ids,
            "ids": each.tokens,
            "finish_reason": each.finish_reason,
            "index": index,
            "seed": (params.seed + index) % 2**64,
        }
        if params.logprobs is not None:
            result["logprobs"] = each.logprobs
            result["top_logprobs"] = [
                [{"id": id_, "logprob": logprob} for id_, logprob in step] for step in each.top
            ]
        # Continuations run as one batch: time and speed are those of all together.
        result["seconds"] = seconds
        result["tokens_per_second"] = count / seconds
        yield result
