"""Comparison with Hugging Face transformers: hidden states after every layer, and logits.

The only module of the package that imports torch and transformers, and only
when it is asked for (``gpt2cupy validate --against hf``).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CheckpointError, Gpt2CupyError
from ..ids import check_ids
from ..model import GPT2
from . import runs
from .check import chosen_decoders, with_decoders
from .compare import Comparison, compare_logits
from .rule import Limit, errors


def _libraries() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise Gpt2CupyError(
            f"--against hf needs torch and transformers: {error}",
            where="validate",
            remedy="Install them with: pip install 'gpt2cupy[parity]'.",
        ) from error
    return torch, transformers


def load(folder: str | Path) -> Any:
    """A folder in Hugging Face layout as their GPT2LMHeadModel, in float32 on the CPU."""
    torch, transformers = _libraries()
    if not Path(folder).exists():
        raise CheckpointError(
            "there is no such folder",
            where=str(folder),
            remedy="Name one in Hugging Face layout with --reference.",
        )
    if not Path(folder).is_dir():
        raise CheckpointError(
            "transformers reads folders in Hugging Face layout only",
            where=str(folder),
            remedy="Name one with --reference.",
        )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        model = transformers.GPT2LMHeadModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip() or repr(error)).splitlines()[0]
        raise CheckpointError(
            f"transformers cannot load the reference: {first}",
            where=str(folder),
            remedy="Name a folder with config.json and safetensors of a GPT-2.",
        ) from error
    return model.eval()


def run(model: Any, ids: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Their residual stream after the embedding and each layer, and their logits, in float64."""
    torch, _ = _libraries()
    states: list[np.ndarray] = []

    def keep(value: Any) -> None:
        states.append(value.detach().double().cpu().numpy())

    blocks = model.transformer.h
    hooks = [blocks[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))]
    for block in blocks:
        hooks.append(
            block.register_forward_hook(
                lambda _, __, out: keep(out[0] if isinstance(out, tuple) else out)
            )
        )
    try:
        with torch.inference_mode():
            logits = model(torch.as_tensor(ids, dtype=torch.long, device=model.device)).logits
    finally:
        for hook in hooks:
            hook.remove()
    return states, logits.double().cpu().numpy()


def compare(
    model: GPT2,
    reference: Any,
    ids: np.ndarray,
    prefilled: int = 0,
    paths: Sequence[str] | None = None,
) -> list[Comparison]:
    """Compare ours with theirs on the same tokens.

    Parameters
    ----------
    model : GPT2
    reference : transformers.GPT2LMHeadModel
        In float32, from :func:`load`. Its parameters are rounded to the model's
        dtype; then float64 is what both are measured against, and its own
        run in the model's dtype is the baseline.
    ids : array of int [B, T]
    prefilled : int
        Tokens before those whose decode steps are compared.
    paths : sequence of str, optional
        As in :func:`validate`.

    Returns
    -------
    list of Comparison
        "embedding", "layer 0" to "layer L - 1", "logits", then every decode
        path; the first that fails is where the two part.

    Raises
    ------
    CheckpointError
        If the two have different shapes.
    """
    torch, _ = _libraries()
    ids = check_ids(ids, model.config)
    decoders = chosen_decoders(model, paths, len(ids))
    _same_shape(model, reference.config)
    dtype = model.dtype.name
    theirs = copy.deepcopy(reference).to(getattr(torch, dtype))
    # The baseline on our device where PyTorch has it; float64 on the CPU.
    on_gpu = model.xp is not np and torch.cuda.is_available()
    base_states, base_logits = run(theirs.to("cuda" if on_gpu else "cpu"), ids)
    theirs = theirs.to("cpu").double()
    with torch.no_grad():
        # Ours keeps the biases that are added to the residual stream in float32.
        for name, bias in reference.named_parameters():
            if name.endswith("c_proj.bias"):
                theirs.get_parameter(name).copy_(bias)
    exact_states, exact_logits = run(theirs, ids)
    names = ["embedding", *(f"layer {layer}" for layer in range(model.config.n_layer))]
    found = []
    for name, ours, base, exact in zip(
        names, runs.layers(model, ids), base_states, exact_states, strict=True
    ):
        limit = Limit.of(base, exact, model.dtype)
        found.append(Comparison(dtype, name, "hf float64", *errors(ours, exact), limit))
    rest = slice(prefilled, None)
    exact_logits = exact_logits[:, rest]
    limit = Limit.of(base_logits[:, rest], exact_logits, model.dtype)
    full = runs.full(model, ids)[:, rest]
    found.append(compare_logits(dtype, "logits", "hf float64", full, exact_logits, limit))
    references = {"hf float64": exact_logits}
    return found + with_decoders(decoders, ids, prefilled, references, limit)


def _same_shape(model: GPT2, theirs: Any) -> None:
    for name in ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions"):
        ours, other = getattr(model.config, name), getattr(theirs, name)
        if ours != other:
            raise CheckpointError(
                f"the model has {name} {ours}, the reference {other}",
                where="--reference",
                remedy="Name a checkpoint of the same shape.",
            )
