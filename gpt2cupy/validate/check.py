"""What is compared with what, for one model in one dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from .. import decode
from ..errors import InputError
from ..generation.engine import Engine
from ..generation.request import Request
from ..ids import check_ids
from ..model import GPT2
from ..sampling import SamplingParams
from ..weights import Weights
from . import runs
from .compare import Comparison, compare_logits
from .rule import Limit


def random_ids(model: GPT2, batch: int, steps: int, seed: int = 0) -> np.ndarray:
    """Token ids [B, T], drawn evenly from the vocabulary."""
    _check_room(model, batch, 0, steps)
    if seed < 0:
        raise InputError(f"seed is {seed}", where="seed", remedy="It must be 0 or more.")
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, (batch, steps))
    return ids.astype(np.int32)


def continued(model: GPT2, prompt: np.ndarray, batch: int, steps: int, seed: int = 0) -> np.ndarray:
    """Ids [B, P - 1 + steps]: a prompt of P tokens and what the model samples after it.

    Raises
    ------
    InputError
        If they do not fit the model's context.
    """
    _check_room(model, batch, len(prompt) - 1, steps)
    rows = [list(prompt) for _ in range(batch)]
    if steps > 1:
        params = SamplingParams(max_new_tokens=steps - 1, temperature=1.0, seed=seed)
        engine = Engine(model, batch, len(prompt) - 1 + steps, decode="eager")
        requests = [Request(row, prompt, params, index=row) for row in range(batch)]
        for token in engine.run(requests):
            rows[token.key].append(token.id)
    return np.array(rows, np.int32)


def _check_room(model: GPT2, batch: int, before: int, steps: int) -> None:
    context = model.config.n_positions
    for name, value in (("batch", batch), ("steps", steps)):
        if value < 1:
            raise InputError(f"{name} is {value}", where=name, remedy="It must be 1 or more.")
    if before + 1 > context:
        raise InputError(
            f"the prompt has {before + 1} tokens, the context {context}",
            where="prompt",
            remedy="Shorten the prompt.",
        )
    if before + steps > context:
        prompt = f"a prompt of {before + 1} tokens and " if before else ""
        raise InputError(
            f"{prompt}{steps} steps exceed the context of {context}",
            where="steps",
            remedy=f"Take at most {context - before} steps.",
        )


def validate(
    model: GPT2,
    ids: np.ndarray,
    *,
    prefilled: int = 0,
    paths: Sequence[str] | None = None,
    weights: Weights | None = None,
) -> list[Comparison]:
    """Compare every way to the logits of the same tokens, with float64 and with each other.

    Parameters
    ----------
    model : GPT2
    ids : array of int [B, T]
        The tokens that every way is fed.
    prefilled : int
        Tokens of each row that the cache is given at once; the steps after them
        are what is compared.
    paths : sequence of str, optional
        Decode paths beside eager; by default all that the device has.
    weights : Weights, optional
        The values the model should hold, in its dtype, on the host; by default
        they are read back from it, and then an error of loading is not seen. Of a
        model in int8, the dequantised values in float32.

    Returns
    -------
    list of Comparison

    Raises
    ------
    InputError
        For ids outside the vocabulary or the context, or an unknown path.
    """
    ids = check_ids(ids, model.config)
    if not 0 <= prefilled < ids.shape[1]:
        raise InputError(
            f"{prefilled} of {ids.shape[1]} tokens cannot be prefilled",
            where="prefilled",
            remedy="Leave at least one token to step through.",
        )
    decoders = chosen_decoders(model, paths, len(ids))
    host = runs.host_weights(model) if weights is None else weights
    dtype = model.dtype.name
    exact = runs.exact(model.config, host, ids)[:, prefilled:]
    rounded = runs.rounded(model.config, host, model.dtype)
    limit = Limit.of(runs.baseline(model.config, rounded, ids)[:, prefilled:], exact, model.dtype)
    full = runs.full(model, ids)[:, prefilled:]
    found = [compare_logits(dtype, "full", "float64", full, exact, limit)]
    return found + with_decoders(decoders, ids, prefilled, {"float64": exact, "full": full}, limit)


def chosen_decoders(model: GPT2, paths: Sequence[str] | None, rows: int) -> list[decode.Decoder]:
    """Eager, which the others are compared with, and the paths named; by default all there are."""
    names = decode.usable(model, rows) if paths is None else paths
    return [decode.decoder(model, name, rows) for name in dict.fromkeys(("eager", *names))]


def with_decoders(
    decoders: Sequence[decode.Decoder],
    ids: np.ndarray,
    prefilled: int,
    references: dict[str, np.ndarray],
    limit: Limit,
) -> list[Comparison]:
    """Compare the steps of each decoder with the references, and with the first decoder's.

    Parameters
    ----------
    decoders : sequence of decoder
    ids : array of int32 [B, T]
    prefilled : int
    references : dict of array [B, T - prefilled, V]
        Names that end in "float64" are exact; any other may err as much as ours.
    limit : Limit
        For a result against float64.
    """
    found: list[Comparison] = []
    others = dict(references)
    pair = dataclasses.replace(limit, sides=2)
    for decoder in decoders:
        dtype, logits = decoder.model.dtype.name, runs.cached(decoder, ids, prefilled)
        for name, values in others.items():
            own = limit if name.endswith("float64") else pair
            found.append(compare_logits(dtype, decoder.name, name, logits, values, own))
        others.setdefault(decoders[0].name, logits)
    return found
