"""``gpt2cupy generate --prompts``: a file of prompts, one a line."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError
from . import shell

if TYPE_CHECKING:
    from ..generation.text import Completion
    from ..lm import LanguageModel


def lines(path: Path) -> Iterator[str]:
    """The prompts of a file ("-" is stdin), read as they are asked for; empty lines are none."""
    if str(path) == "-":
        yield from _texts(sys.stdin.buffer, "stdin")
        return
    try:
        with path.open("rb") as file:
            yield from _texts(file, str(path))
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}",
            where=str(path),
            remedy="Give a text file that you may read.",
        ) from error


def _texts(file: Any, where: str) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        text = shell.decoded(line, f"{where}, line {number}").rstrip("\r\n")
        if text:
            yield text


def run(
    lm: LanguageModel,
    path: Path,
    settings: dict[str, Any],
    max_batch: int | None,
    *,
    special: bool,
    echo: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Continue each prompt, and write them in their order.

    Parameters
    ----------
    lm : LanguageModel
    path : Path
    settings : dict
        Fields of SamplingParams.
    max_batch : int or None
    special, echo, as_json, quiet : bool
        As the options of the command.
    """
    given: list[str] = []  # prompts whose completions are not yet written

    def prompts() -> Iterator[Any]:
        for text in lines(path):
            given.append(text)
            yield lm.tokenizer.encode(text, allowed_special="all") if special else text

    start, texts, tokens = time.perf_counter(), 0, 0
    # Where the texts themselves are on the terminal, they are the progress.
    seen = [stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)]
    bar = not quiet and seen == [False, True]
    slots = lm.most_slots if max_batch is None else max_batch
    each: Completion
    for found in lm.generate(prompts(), max_batch=slots, progress=bar, **settings):
        prompt = given.pop(0)
        for index, each in enumerate(found if isinstance(found, list) else [found]):
            if as_json:
                row = {"prompt": prompt, **dataclasses.asdict(each), "index": index}
                if "logprobs" not in settings:
                    del row["logprobs"], row["top"]
                shell.write_json(row)
            else:
                shell.write(f"{prompt if echo else ''}{each.text}\n")
            texts, tokens = texts + 1, tokens + len(each.tokens)
    seconds = time.perf_counter() - start
    summary = f"{texts} texts, {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s"
    shell.say(shell.paint(summary, shell.DIM), quiet=quiet)
