"""The body of ``gpt2cupy validate``: checkpoints in, tables or JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .. import checkpoint, loading, output
from ..errors import Gpt2CupyError, InputError, shown
from ..ids import check_tokens
from ..model import GPT2
from ..quantize import MATRICES, through_int8
from ..record import environment
from ..tokenizer import Tokenizer
from ..validate import table
from ..validate.check import continued, random_ids, validate
from ..validate.compare import Comparison
from ..weights import RESIDUAL_BIASES, Weights

AGAINST = ("float64", "hf")
STEPS = 128


@dataclass(frozen=True)
class Settings:
    """What is compared; the fields are the options of the command."""

    model: str = "shakespeare"
    steps: int | None = None  # as many as STEPS, or as fit the context
    batch: int = 2
    prompt: str | None = None
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    path: tuple[str, ...] = ()
    against: str = "float64"
    reference: str | None = None
    revision: str | None = None
    quantize: str | None = None
    batch_invariant: bool = False
    variant: str | None = None
    adapter: str | None = None


def run(settings: Settings, *, as_json: bool = False) -> bool:
    """Validate, print tables (or JSON) and the verdict; returns whether everything passed.

    Raises
    ------
    Gpt2CupyError
        If the settings cannot be run: an unknown dtype, path or model, a prompt
        longer than the context, transformers missing.
    """
    comparisons: list[Comparison] = []
    try:
        for found in compare(settings):
            comparisons += found
    except (Gpt2CupyError, KeyboardInterrupt):
        # One dtype may not fit where others did: what was found is shown, without a verdict.
        if comparisons:
            _show(settings, comparisons, None, as_json)
        raise
    passed = all(comparison.passed for comparison in comparisons)
    _show(settings, comparisons, passed, as_json)
    verdict = table.verdict(comparisons)
    if as_json:
        print(verdict, file=sys.stderr, flush=True)
    else:
        output.write(f"{verdict}\n")
    return passed


def _show(
    settings: Settings, comparisons: list[Comparison], passed: bool | None, as_json: bool
) -> None:
    if as_json:
        gpu = loading.resolve_device(settings.device)[0] == "cuda"
        whole = {
            "settings": asdict(settings),
            "environment": environment(gpu=gpu),
            "passed": passed,
            "comparisons": [comparison.to_dict() for comparison in comparisons],
        }
        output.write(json.dumps(whole, indent=1, allow_nan=False) + "\n")
        return
    from .console import Console

    Console().print(table.render(comparisons))


def compare(settings: Settings) -> Iterator[list[Comparison]]:
    """The comparisons of one dtype after another."""
    if settings.against not in AGAINST:
        raise InputError(
            f"unknown reference {shown(settings.against)}",
            where="--against",
            remedy=f"Use {' or '.join(AGAINST)}.",
        )
    if settings.reference is not None and settings.against != "hf":
        raise InputError(
            "--reference means nothing without --against hf",
            where="--reference",
            remedy="Add --against hf.",
        )
    if settings.against == "hf" and settings.quantize:
        raise InputError(
            "transformers has no int8 weights like these to compare with",
            where="--quantize",
            remedy="Validate against float64, which has the dequantised values.",
        )
    for name in ("variant", "adapter"):
        if settings.against == "hf" and getattr(settings, name) and not settings.reference:
            raise InputError(
                f"transformers would load the checkpoint without its {name}",
                where=f"--{name}",
                remedy="Add --reference with a folder of the same weights, or validate against "
                "float64.",
            )
    kind, index = loading.resolve_device(settings.device)
    dtypes = _dtypes(settings.dtype, kind)
    source = checkpoint.open(
        settings.model,
        revision=settings.revision,
        variant=settings.variant,
        adapter=settings.adapter,
    )
    theirs = _load_theirs(settings, source) if settings.against == "hf" else None
    for dtype in dtypes:
        held = loading.resolve_dtype(dtype, source.dtype, kind)
        weights = _host_weights(source, held, settings.quantize)
        placed = weights
        if kind != "cpu":
            # From the files again, so that an error of loading would be seen.
            tensors, to = source.tensors(), (held, kind, index)
            placed = loading.place(source.config, tensors, *to, quantize=settings.quantize)
        model = GPT2(source.config, placed, batch_invariant=settings.batch_invariant)
        ids, prefilled = _tokens(settings, source, model)
        paths = settings.path or None
        if theirs is None:
            yield validate(model, ids, prefilled=prefilled, paths=paths, weights=weights)
        else:
            from ..validate import huggingface

            yield huggingface.compare(model, theirs, ids, prefilled, paths=paths)


def _host_weights(source: checkpoint.Checkpoint, held: np.dtype, quantize: str | None) -> Weights:
    """What a model in that dtype should hold; the values of int8 are exact in float32."""
    tensors = source.tensors(finite=True)
    if quantize is None:
        return Weights.from_tensors(source.config, tensors, held)
    weights = Weights.from_tensors(source.config, through_int8(tensors), np.float32)
    for name, array in weights.items():
        if name not in (*MATRICES, *RESIDUAL_BIASES):
            array[...] = array.astype(held)
    return weights


def _dtypes(name: str, kind: str) -> Sequence[str]:
    """The dtypes to validate: "auto" is every one that the device computes in."""
    possible = ("float32",) if kind == "cpu" else loading.DTYPES
    if name == "auto":
        return possible
    # As a GPU would hold it: on the CPU every dtype becomes float32, which is not what was asked.
    full = loading.resolve_dtype(name, np.dtype(np.float32), "cuda").name
    if full not in possible:
        raise InputError(
            f"the NumPy engine computes in float32 only, not in {full}",
            where="dtype",
            remedy="Validate other dtypes on a GPU.",
        )
    return (full,)


def _tokens(settings: Settings, source: checkpoint.Checkpoint, model: GPT2) -> tuple[Any, int]:
    """Ids [B, T], and how many of them come before the steps."""
    batch, seed, context = settings.batch, settings.seed, model.config.n_positions

    def steps(before: int) -> int:
        fitting = max(min(STEPS, context - before), 1)
        return fitting if settings.steps is None else settings.steps

    if settings.prompt is None:
        return random_ids(model, batch, steps(0), seed), 0
    tokenizer = Tokenizer.from_path(source.path)
    prompt = tokenizer.encode(settings.prompt) or [tokenizer.eot_token]
    checked = check_tokens(prompt, model.config)
    before = len(checked) - 1
    return continued(model, checked, batch, steps(before), seed), before


def _load_theirs(settings: Settings, source: checkpoint.Checkpoint) -> Any:
    from ..validate import huggingface

    return huggingface.load(settings.reference or source.path)
