"""``gpt2cupy generate``."""

from __future__ import annotations

import dataclasses
import enum
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import NonFiniteError, shown
from ..sampling import DEFAULT_NEW_TOKENS, SamplingParams
from . import dialogue, options, progress, prompt_file, shell

if TYPE_CHECKING:
    from ..generation.text import Completion
    from ..lm import LanguageModel


Gemv = enum.Enum("Gemv", {"ours": "ours", "cublas": "cublas"})
Speculation = enum.Enum("Speculation", {"ngram": "ngram"})


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='Text to continue; "-" or a pipe reads stdin.')
    ] = None,
    prompt_option: Annotated[
        str | None, typer.Option("--prompt", "-p", help="The text, as an option.")
    ] = None,
    file: options.File = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='A file of prompts, one a line; "-" reads stdin. See also batch.'),
    ] = None,
    max_batch: Annotated[
        int | None,
        typer.Option(help="With --prompts: texts at once; by default as batch has it."),
    ] = None,
    special: options.Special = False,
    model: options.Model = "shakespeare",
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
    generation_config: Annotated[
        bool,
        typer.Option(
            "--generation-config",
            help="Sample as the model's generation_config.json says, where no option does.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens to write at most; by default {DEFAULT_NEW_TOKENS}, or fewer where the "
            "context ends."
        ),
    ] = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(help="The text does not end before that many.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0, the default, is greedy: no sampling.")
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(help="Sample from the k most probable. 0, the default, is off."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample from this much probability. 1, the default, is off."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(help="Least share of the best one's probability. 0, the default, is off."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(help="Penalty on tokens of prompt and text. 1, the default, is off."),
    ] = None,
    presence_penalty: Annotated[
        float | None, typer.Option(help="Against tokens of the text. 0, the default, is off.")
    ] = None,
    frequency_penalty: Annotated[
        float | None, typer.Option(help="The same for each occurrence. 0, the default, is off.")
    ] = None,
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=NUMBER", help="Added to a token's logit; -inf bans. Repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(metavar="<str>", help="End before this text. Repeatable.")
    ] = None,
    eos_token_id: Annotated[
        list[int] | None,
        typer.Option(
            metavar="<int>",
            help="Token that ends the text, in place of the model's; -1 is none. Repeatable.",
        ),
    ] = None,
    stop_token_ids: Annotated[
        list[int] | None, typer.Option(metavar="<int>", help="A further such token. Repeatable.")
    ] = None,
    n: Annotated[
        int | None,
        typer.Option("--n", "-n", help="Continuations; number i uses seed + i."),
    ] = None,
    logprobs: Annotated[
        int | None,
        typer.Option(help="With --json: logprobs, and those of so many most probable tokens."),
    ] = None,
    speculate: Annotated[
        Speculation | None,
        typer.Option(help="Guess tokens from the text so far: faster where it repeats itself."),
    ] = None,
    echo: Annotated[
        bool, typer.Option("--echo/--no-echo", help="Write the prompt before the text.")
    ] = True,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Continue a prompt, writing text as it comes; what ran and how fast goes to stderr.

    With --n the continuations are written when all are finished. With --json each
    is an object with the fields of a Completion, as docs/api.md has them (logprobs
    and top where --logprobs asks), and prompt, index and speeds. On a terminal without
    a prompt you and the model write in turn.
    """
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
        "frequency_penalty": frequency_penalty,
        "logit_bias": _biases(logit_bias or []) or None,
        "seed": seed,
        "stop": stop or None,
        "eos_token_id": eos_token_id[0] if eos_token_id == [-1] else eos_token_id or None,
        "stop_token_ids": stop_token_ids or None,
        "n": n,
        "logprobs": logprobs,
        "speculate": options.name_of(speculate),
    }
    settings = {name: value for name, value in given.items() if value is not None}
    if logprobs is not None and not as_json:
        raise typer.BadParameter("--logprobs needs --json")
    if batch_invariant and gemv is not None:
        raise typer.BadParameter("give --gemv or --batch-invariant, not both")
    if prompt_option is not None and prompt is not None:
        raise typer.BadParameter("give the prompt once, with --prompt or without")
    if prompts is not None and any(x is not None for x in (prompt, prompt_option, file)):
        raise typer.BadParameter("give --prompts or one prompt, not both")
    if max_batch is not None and prompts is None:
        raise typer.BadParameter("--max-batch is for --prompts")
    if speculate and (n not in (None, 1) or (prompts is not None and max_batch != 1)):
        more = "leave out --n" if prompts is None or n not in (None, 1) else "add --max-batch 1"
        raise typer.BadParameter(f"--speculate is for one text at a time: {more}")
    if quiet:
        shell.silence_warnings()
    SamplingParams(**settings)  # refuses what cannot be, before anything is loaded
    in_turn = _in_turn(prompt, prompt_option, file, prompts) and not as_json and n in (None, 1)
    text = (
        ""
        if in_turn or prompts is not None
        else shell.read_text(prompt if prompt_option is None else prompt_option, file)
    )

    from ..decode import decoder
    from ..lm import load

    lm = load(
        model, dtype=dtype, device=device, revision=revision, variant=variant, adapter=adapter,
        tokenizer=tokenizer, batch_invariant=batch_invariant, quantize=options.name_of(quantize),
        generation_config=generation_config,
    )  # fmt: skip
    with lm, progress.compiling(quiet=quiet):
        if gemv is not None:
            lm.model.force_gemv(gemv.value)
        if decode != "auto":
            # Refuses a path that is not there before text is written.
            decoder(lm.model, decode, settings.get("n", 1))
        lm.model.decode_path = decode
        shell.say_model(lm, quantized=quantize is not None, quiet=quiet)
        _say_settings(lm, taken=generation_config, quiet=quiet)
        if prompts is not None:
            prompt_file.run(
                lm, prompts, settings, max_batch,
                special=special, echo=echo, as_json=as_json, quiet=quiet,
            )  # fmt: skip
            return
        if in_turn:
            dialogue.Dialogue(lm, settings, special=special).run()
            return
        ids = lm.tokenizer.encode(text, allowed_special="all") if special else text
        several = settings.get("n", 1) > 1
        if as_json or several:
            start = time.perf_counter()
            found, failure = _finished(lm, ids, settings)
            seconds = time.perf_counter() - start
            if as_json:
                for line in _objects(text, found, seconds, with_logprobs=logprobs is not None):
                    shell.write_json(line)
            else:
                _write_several(text if echo else "", found, seconds, quiet)
            if failure:
                raise failure
        else:
            _stream(lm, ids, settings, text if echo else "", quiet)


def _in_turn(*given: Any) -> bool:
    """Whether nothing is given to continue, and there is a user to ask."""
    streams = sys.stdin, sys.stdout
    asked = any(each is not None for each in given)
    return not asked and all(each is not None and each.isatty() for each in streams)


def _biases(given: list[str]) -> dict[int, float]:
    """``--logit-bias 50256=-inf`` as a mapping."""
    found: dict[int, float] = {}
    for each in given:
        match = re.fullmatch(r"(\d{1,9})[=:]([-+]?(?:inf|[\d.]+(?:e[-+]?\d+)?))", each.strip())
        try:
            id_, bias = int(match[1]), float(match[2])  # type: ignore[index]
        except (TypeError, ValueError):
            raise typer.BadParameter(
                f"--logit-bias {shown(each)} is not ID=NUMBER, as in 50256=-inf"
            ) from None
        if found.setdefault(id_, bias) != bias:
            raise typer.BadParameter(f"--logit-bias has two numbers for token {id_}")
    return found


def _say_settings(lm: LanguageModel, *, taken: bool, quiet: bool) -> None:
    """A line that says what generation_config.json sets, or would."""
    if not lm.generation_config.settings:
        return
    asked = lm.generation_config.described()
    line = f"generation_config.json: {asked}"
    if not taken:
        line += ", not taken without --generation-config"
    shell.say(shell.paint(line, shell.DIM), quiet=quiet)


def _stream(
    lm: LanguageModel, prompt: str | list[int], settings: dict[str, Any], echo: str, quiet: bool
) -> None:
    """One continuation, as it comes."""
    pieces = lm.stream(prompt, **settings)  # refuses what cannot be, before anything is written
    piece, count = None, 0
    for piece in pieces:
        # The prompt comes with the first token: until then stderr may have its line.
        shell.write(piece.text if count else echo + piece.text)
        count += 1
    shell.write("\n" if count else f"{echo}\n")
    if piece:
        summary = (
            f"{count} tokens ({piece.finish_reason}), first after "
            f"{piece.prefill_seconds * 1e3:.1f} ms, then {piece.tokens_per_second:.0f} tokens/s"
        )
        if settings.get("speculate"):
            summary += f", {piece.accepted} of {piece.drafted} drafts accepted"
        shell.say(shell.paint(summary, shell.DIM), quiet=quiet)


def _finished(
    lm: LanguageModel, prompt: str | list[int], settings: dict[str, Any]
) -> tuple[list[Completion | None], NonFiniteError | None]:
    """The continuations, and the error of those that have none."""
    single = settings.get("n", 1) == 1
    found: Any
    try:
        found = lm.generate(prompt, **settings)
    except NonFiniteError as error:
        return [] if single else error.completions, error
    return [found] if single else found, None


def _write_several(echo: str, found: list[Completion | None], seconds: float, quiet: bool) -> None:
    """Several continuations, each under a heading on stderr."""
    done = [each for each in found if each is not None]
    for number, each in enumerate(found, 1):
        if each is not None:
            heading = f"[{number} of {len(found)}: {shell.extent(each)}]"
            shell.say(shell.paint(heading, shell.DIM), quiet=quiet)
            shell.write(f"{echo}{each.text}\n")
    count = sum(len(each.tokens) for each in done)
    summary = f"{count} tokens in {seconds:.2f} s, {count / seconds:.0f} tokens/s"
    shell.say(shell.paint(summary, shell.DIM), quiet=quiet)


def _objects(
    prompt: str, found: list[Completion | None], seconds: float, *, with_logprobs: bool
) -> Iterator[dict[str, Any]]:
    """What ``--json`` writes, one object per continuation."""
    count = sum(len(each.tokens) for each in found if each)
    for index, each in enumerate(found):
        if each is None:
            continue
        result = {"prompt": prompt, **dataclasses.asdict(each), "index": index}
        if not with_logprobs:
            del result["logprobs"], result["top"]
        # Continuations run as one batch: time and speed are those of all together.
        yield result | {"seconds": seconds, "tokens_per_second": count / seconds}
