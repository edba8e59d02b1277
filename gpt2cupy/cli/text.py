"""``gpt2cupy score`` and ``gpt2cupy tokenize``."""

from __future__ import annotations

import re
import sys
from typing import Annotated, Any

import typer

from ..errors import InputError
from . import options, progress, shell


def score(
    text: Annotated[
        str | None, typer.Argument(help='Text to score; "-" or a pipe reads stdin.')
    ] = None,
    file: options.File = None,
    model: options.Model = "shakespeare",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    quantize: options.Quantize = None,
    batch_invariant: options.BatchInvariant = False,
    revision: options.Revision = None,
    variant: options.Variant = None,
    adapter: options.Adapter = None,
    tokenizer: options.Tokenizer = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens of a window; by default the context.")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="How far each window moves; by default half of it.")
    ] = None,
    bos: Annotated[
        bool,
        typer.Option("--bos/--no-bos", help="Score the first token too, after the model's bos."),
    ] = True,
    special: options.Special = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="List each token first: id, logprob and text.")
    ] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """How well the model predicts a text: tokens, bits per byte, perplexity."""
    if quiet:
        shell.silence_warnings()
    given = shell.read_text(text, file)

    from ..lm import load

    lm = load(
        model, dtype=dtype, device=device, revision=revision, variant=variant, adapter=adapter,
        tokenizer=tokenizer, batch_invariant=batch_invariant, quantize=options.name_of(quantize),
    )  # fmt: skip
    with lm, progress.compiling(quiet=quiet):
        shell.say_model(lm, quantized=quantize is not None, quiet=quiet)
        if not given:
            raise InputError("there is nothing to score", where="text", remedy="Pass more text.")
        ids = lm.tokenizer.encode(given, allowed_special="all") if special else given
        found = lm.score(ids, window=window, stride=stride, bos=bos)
        totals: dict[str, Any] = {
            "count": len(found.tokens),
            "bytes": len(given.encode("utf-8", "replace")),
            "bits_per_byte": found.bits_per_byte(given),
            "perplexity": found.perplexity,
        }
        logprobs = found.logprobs.tolist()
        if as_json:
            each = {"tokens": found.tokens, "logprobs": logprobs} if tokens else {}
            shell.write_json(totals | each)
            return
        if tokens:
            for id_, logprob in zip(found.tokens, logprobs, strict=True):
                shell.write(f"{id_}\t{logprob:.4f}\t{lm.tokenizer.decode([id_])!r}\n")
        for label, value in {"tokens": totals.pop("count"), **totals}.items():
            shown = f"{value:.4f}" if isinstance(value, float) else value
            shell.write(f"{label.replace('_', ' '):<14} {shown}\n")


def tokenize(
    text: Annotated[
        list[str] | None,
        typer.Argument(help='Text, or ids with --decode; "-" or a pipe reads stdin.'),
    ] = None,
    file: options.File = None,
    model: options.Model = "shakespeare",
    revision: options.Revision = None,
    tokenizer: options.Tokenizer = None,
    decode: Annotated[bool, typer.Option("--decode", help="From ids to text.")] = False,
    special: options.Special = False,
    as_json: options.Json = False,
) -> None:
    """Token ids of a text, or with --decode the text of ids; loads no weights."""
    if text and len(text) > 1 and not decode:
        raise typer.BadParameter("give one text, in quotes")
    if special and decode:
        raise typer.BadParameter("--special is for encoding")
    given = shell.read_text(" ".join(text) if text else None, file)

    from ..checkpoint.resolve import resolve
    from ..tokenizer import Tokenizer

    coder = Tokenizer.from_path(resolve(model, revision) if tokenizer is None else tokenizer)
    if not decode:
        ids = coder.encode(given, allowed_special="all" if special else "none")
        if as_json:
            shell.write_json({"tokens": ids, "texts": [coder.decode([id_]) for id_ in ids]})
        else:
            shell.write(" ".join(map(str, ids)) + "\n")
        return
    ids = _ids(given)
    if as_json:
        shell.write_json({"tokens": ids, "text": coder.decode(ids)})
    else:
        # Into a pipe or a file goes the text alone, as it was before it was encoded.
        at_terminal = sys.stdout is not None and sys.stdout.isatty()
        shell.write(coder.decode(ids) + ("\n" if at_terminal else ""))


def _ids(text: str) -> list[int]:
    """Ids between spaces or commas, also as a JSON list."""
    words = re.split(r"[\s,]+", text.strip().removeprefix("[").removesuffix("]").strip())
    for word in words:
        if word and not re.fullmatch(r"[0-9]{1,9}", word):
            raise InputError(
                f"{word[:40]!r} is no token id",
                where="tokenize --decode",
                remedy="Give ids separated by spaces or commas.",
            )
    return [int(word) for word in words if word]
