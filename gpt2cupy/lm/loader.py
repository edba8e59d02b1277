"""Loads a checkpoint with its tokenizer and its settings as a LanguageModel."""

from __future__ import annotations

import os

from .. import loading
from ..errors import InputError, NoTokenizerError, kind_of, not_a_flag
from ..generation.generation_config import GenerationConfig
from ..model import GPT2, check_batch_invariant
from ..tokenizer import NoTokenizer, Tokenizer
from .language_model import LanguageModel


def load(
    name_or_path: str = "shakespeare",
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    adapter: str | None = None,
    tokenizer: str | Tokenizer | None = None,
    batch_invariant: bool = False,
    quantize: str | None = None,
    generation_config: bool = False,
    prefix_cache: bool = False,
) -> LanguageModel:
    """Load a checkpoint as a :class:`LanguageModel`.

    Parameters
    ----------
    name_or_path : str
        "shakespeare" (embedded), an alias (gpt2, gpt2-medium, gpt2-large,
        gpt2-xl, distilgpt2), a hub id, a folder in Hugging Face layout, a file of
        weights beside its config.json, nanoGPT's ``ckpt.pt``, or an llm.c ``.bin``
        file.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        "auto" keeps the stored one on a GPU; the CPU always computes in float32,
        and warns if another one is asked for.
    device : str
        "auto" (the GPU where one can be used), "cpu", "cuda" or "cuda:1".
    revision : str, optional
        Branch, tag or commit of a hub id.
    variant : str, optional
        "fp16" takes ``model.fp16.safetensors`` in place of ``model.safetensors``.
    adapter : str, optional
        Folder or hub id of a LoRA adapter of PEFT, which is merged into the weights.
    tokenizer : str or Tokenizer, optional
        Folder or llm.c tokenizer file; by default the checkpoint's own. If none can be
        read, the model takes and returns token ids, and text raises.
    batch_invariant : bool
        Give a prompt's results the same bits whatever runs beside it and however many slots
        there are; docs/batch-invariance.md says what that costs.
    quantize : {None, "int8"}
        "int8" holds the matrices in a byte per weight; ``dtype`` then is that of everything
        else, such as activations and cache. The CPU computes with the same rounded weights
        in float32.
    generation_config : bool
        Take the defaults of :class:`SamplingParams` from the checkpoint's
        generation_config.json, and warn of its settings that are not supported. The tokens
        that end a text are read from it in any case.
    prefix_cache : bool
        Let a prompt reuse the beginning that it shares with a prompt of an earlier call, as
        far as that is still in memory: for dialogues. A second call may then differ from the
        first in its last bits. Prompts of one call share their beginnings in any case.

    Raises
    ------
    Gpt2CupyError
        One of its kinds, naming what is wrong, where, and the remedy.
    """
    if not isinstance(tokenizer, str | os.PathLike | Tokenizer | None):
        raise InputError(
            f"a tokenizer cannot be {kind_of(tokenizer)}",
            where="tokenizer",
            remedy="Pass a folder, a file or a Tokenizer.",
        )
    if not isinstance(generation_config, bool):
        raise not_a_flag("generation_config", generation_config)
    if not isinstance(prefix_cache, bool):
        raise not_a_flag("prefix_cache", prefix_cache)
    check_batch_invariant(batch_invariant)
    weights, source = loading.load_weights(
        name_or_path, dtype=dtype, device=device, revision=revision, variant=variant,
        adapter=adapter, quantize=quantize,
    )  # fmt: skip
    model = GPT2(source.config, weights, batch_invariant=batch_invariant)
    if tokenizer is None:
        try:
            tokenizer = Tokenizer.from_path(source.path)
        except NoTokenizerError as reason:
            tokenizer = NoTokenizer(reason)
    elif not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_path(tokenizer)
    generation = GenerationConfig.beside(source.path, model.config)
    return LanguageModel(
        model, tokenizer, source.name, generation,
        defaults_from_file=generation_config, prefix_cache=prefix_cache,
    )  # fmt: skip
