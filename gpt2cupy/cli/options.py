"""Options that several commands share."""

from __future__ import annotations

import enum
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str, typer.Option("--model", "-m", help="Name, hub id, folder, or file of weights.")
]
Dtype = Annotated[str, typer.Option(help="auto, float32, float16 or bfloat16.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Variant = Annotated[
    str | None, typer.Option(help='As "fp16": takes model.fp16.safetensors of a folder or hub id.')
]
Adapter = Annotated[
    str | None, typer.Option(help="LoRA adapter of PEFT, a folder or hub id, merged at load.")
]
Quantization = enum.Enum("Quantization", {"int8": "int8"})
Quantize = Annotated[
    Quantization | None,
    typer.Option(help="Hold the matrices in int8; --dtype is that of the rest."),
]
BatchInvariant = Annotated[
    bool,
    typer.Option("--batch-invariant", help="The same bits whatever runs beside a text; slower."),
]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder, tokenizer.json or llm.c file; by default the model's own."),
]
File = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read the text from a file, as it is.")
]
Special = Annotated[
    bool,
    typer.Option("--special", help="Encode special tokens in the text as their ids."),
]
Json = Annotated[bool, typer.Option("--json", help="JSON, one object per line.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only errors on stderr.")]


def name_of(choice: enum.Enum | None) -> str | None:
    """The word that was chosen."""
    return None if choice is None else str(choice.value)


def within(least: float, most: float | None = None) -> Callable[[float], float]:
    """A callback of an option that refuses numbers outside a range.

    typer's own ranges take a column of the help in which the names of the options are cut off.
    """

    def checked(value: float) -> float:
        if not (least <= value and (most is None or value <= most)):
            allowed = f"{least:g} or more" if most is None else f"from {least:g} to {most:g}"
            raise typer.BadParameter(f"{value} is impossible. It must be {allowed}.")
        return value

    return checked
