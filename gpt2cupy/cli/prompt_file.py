"""``gpt2cupy generate --prompts``: a file of prompts, one a line."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import Gpt2CupyError, InputError
from . import shell

if TYPE_CHECKING:
    from ..generation.text import Completion
    from ..lm import LanguageModel


def lines(path: Path) -> Generator[tuple[int, str], None, None]:
    """(number, text) of each line of a file ("-" is stdin), from 1, read as they are asked for."""
    if str(path) == "-":
        if sys.stdin is None:
            raise InputError("it is closed", where="stdin", remedy="Pipe the prompts into it.")
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


def _texts(file: Any, where: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        yield number, shell.decoded(line, f"{where}, line {number}").rstrip("\r\n")


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
    """Continue each line that is not empty, and write the texts in the order of the lines.

    A heading on stderr names the line of each, unless a progress bar stands there.

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
    given: deque[tuple[int, str]] = deque()  # lines whose completions are not yet written
    empty = 0

    def prompts(read: Iterator[tuple[int, str]]) -> Iterator[Any]:
        nonlocal empty
        for number, text in read:
            if not text:
                empty += 1
                continue
            given.append((number, text))
            yield lm.tokenizer.encode(text, allowed_special="all") if special else text

    start, written, texts, tokens = time.perf_counter(), 0, 0, 0
    # Where the texts themselves are on the terminal, they are the progress.
    seen = [stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr)]
    bar = not quiet and seen == [False, True]
    slots = lm.most_slots if max_batch is None else max_batch
    each: Completion
    try:
        with contextlib.closing(lines(path)) as read:
            for found in lm.generate(prompts(read), max_batch=slots, progress=bar, **settings):
                number, prompt = given.popleft()
                written += 1
                for index, each in enumerate(found if isinstance(found, list) else [found]):
                    if as_json:
                        row = {"line": number, "prompt": prompt, **dataclasses.asdict(each)}
                        row["index"] = index
                        if "logprobs" not in settings:
                            del row["logprobs"], row["top"]
                        shell.write_json(row)
                    else:
                        which = f", {index + 1} of {len(found)}" if isinstance(found, list) else ""
                        heading = f"[line {number}{which}: {shell.extent(each)}]"
                        shell.say(shell.paint(heading, shell.DIM), quiet=quiet or bar)
                        shell.write(f"{prompt if echo else ''}{each.text}\n")
                    texts, tokens = texts + 1, tokens + len(each.tokens)
    except Gpt2CupyError as error:
        raise _by_line(error, path, given, written) from error
    seconds = time.perf_counter() - start
    summary = f"{texts} text{'s' if texts != 1 else ''}, {tokens} tokens in {seconds:.2f} s"
    summary += f", {tokens / seconds:.0f} tokens/s"
    if empty:
        summary += f"; {empty} empty {'line was' if empty == 1 else 'lines were'} left out"
    shell.say(shell.paint(summary, shell.DIM), quiet=quiet)


def _by_line(
    error: Gpt2CupyError, path: Path, given: Sequence[tuple[int, str]], written: int
) -> Gpt2CupyError:
    """The error, with the line of the file in place of the number among the prompts."""
    match = re.match(r"prompt (\d+)(?=,|$)", error.where)
    if match is None or not 0 <= (place := int(match[1]) - written) < len(given):
        return error
    file = "stdin" if str(path) == "-" else path
    where = f"{file}, line {given[place][0]}{error.where[match.end() :]}"
    return type(error)(error.what, where=where, remedy=error.remedy)
