"""generation_config.json: where texts begin and end, and how they are sampled if that is asked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import GPT2Config
from ..errors import ConfigError, shown
from ..files import open_plain

NAME = "generation_config.json"
_MAX_BYTES = 1 << 20
_DEFAULT_TOP_K = 50  # of transformers, where a file samples and says nothing of it

# What it may hold that changes no text here: ids that are read elsewhere, what is returned and
# how, caches, and options of methods that are named below where they are asked for.
_WITHOUT_EFFECT = {
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id", "do_sample"),
    *("transformers_version", "use_cache", "cache_implementation", "cache_config", "low_memory"),
    *("return_dict_in_generate", "return_legacy_cache", "disable_compile", "compile_config"),
    *(
        "early_stopping",
        "length_penalty",
        "renormalize_logits",
        "is_assistant",
        "trust_remote_code",
    ),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    *("assistant_lookbehind", "target_lookbehind", "generation_kwargs", "max_cache_len"),
    *("torch_dtype", "dtype", "remove_invalid_values", "num_beam_groups", "diversity_penalty"),
}
_OF_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
_ALWAYS = ("repetition_penalty", "max_new_tokens", "min_new_tokens")
# What we lack, with the values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "max_length": (20,),
    "min_length": (0,),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "guidance_scale": (1.0,),
    "penalty_alpha": (0.0,),
}


@dataclass(frozen=True)
class GenerationConfig:
    """What a checkpoint's generation_config.json says.

    Attributes
    ----------
    bos_token_id : int or None
        Token from which an empty prompt starts.
    eos_token_ids : tuple of int
        Tokens that end a text.
    settings : dict
        Fields of :class:`SamplingParams` that it sets; taken on request.
    lacking : tuple of str
        What it asks for and this package does not have.
    where : str
        Its path; "" without a file.
    """

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    where: str = ""

    @classmethod
    def beside(cls, checkpoint: Path, config: GPT2Config) -> GenerationConfig:
        """That of a checkpoint's folder; an empty one where there is none.

        Raises
        ------
        ConfigError
            If it cannot be read, or an id is no integer.
        """
        folder = checkpoint if checkpoint.is_dir() else checkpoint.parent
        path = folder / NAME
        # The folder of another file may belong to something else.
        known = checkpoint.is_dir() or checkpoint.suffix == ".safetensors"
        if not known or not path.exists():
            return cls()
        return cls.from_dict(_read(path), config, where=str(path))

    @classmethod
    def from_dict(
        cls, fields: dict[str, Any], config: GPT2Config, *, where: str = NAME
    ) -> GenerationConfig:
        """Check the fields of a file against the vocabulary of its model."""
        starts = _ids(fields, "bos_token_id", where)
        known = [id_ for id_ in _ids(fields, "eos_token_id", where) if id_ < config.vocab_size]
        settings = dict(_settings(fields, config, where))
        return cls(
            bos_token_id=starts[0] if starts and starts[0] < config.vocab_size else None,
            eos_token_ids=tuple(known),
            settings=settings,
            lacking=tuple(_lacking(fields)),
            where=where,
        )

    def described(self) -> str:
        """The settings in one line, as options are written."""
        shown_ = {key: value for key, value in self.settings.items() if key != "logit_bias"}
        if banned := self.settings.get("logit_bias"):
            shown_["logit_bias"] = f"{len(banned)} banned"
        return ", ".join(f"{key}={value}" for key, value in shown_.items())


def _read(path: Path) -> dict[str, Any]:
    try:
        with open_plain(path) as file:
            fields = json.loads(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"cannot read the generation settings: {error}"[:200],
            where=str(path),
            remedy="Restore the file, or remove it.",
        ) from error
    if not isinstance(fields, dict):
        raise ConfigError(
            "the generation settings are not a JSON object",
            where=str(path),
            remedy="Restore the file, or remove it.",
        )
    return fields


def _ids(fields: dict[str, Any], name: str, where: str) -> list[int]:
    """The ids of a field that holds one, several or none."""
    value = fields.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
        raise ConfigError(
            f"{name} must be an integer or several, not {shown(value)}",
            where=where,
            remedy="Correct the value, or remove it.",
        )
    return [id_ for id_ in ids if id_ >= 0]


def _settings(fields: dict[str, Any], config: GPT2Config, where: str) -> Iterator[tuple[str, Any]]:
    """Fields of SamplingParams; their values are checked where they are used."""
    if fields.get("do_sample"):
        given = {"temperature": 1.0, "top_k": _DEFAULT_TOP_K}
        given |= {key: fields[key] for key in _OF_SAMPLING if fields.get(key) is not None}
        yield from given.items()
    for name in _ALWAYS:
        if fields.get(name) is not None:
            yield name, fields[name]
    if stops := fields.get("stop_strings"):
        yield "stop", stops
    banned = _ids(fields, "suppress_tokens", where)
    words = fields.get("bad_words_ids")
    for word in words if isinstance(words, list) else ():
        if isinstance(word, list) and len(word) == 1:
            banned += _ids({"bad_words_ids": word}, "bad_words_ids", where)
    if known := sorted({id_ for id_ in banned if id_ < config.vocab_size}):
        yield "logit_bias", dict.fromkeys(known, -math.inf)


def _lacking(fields: dict[str, Any]) -> Iterator[str]:
    taken = {*_OF_SAMPLING, *_ALWAYS, "stop_strings", "suppress_tokens", *_WITHOUT_EFFECT}
    for name, value in fields.items():
        if name in taken or name.startswith(("_", "output_")):
            continue
        if name == "bad_words_ids":
            words = value if isinstance(value, list) else []
            if all(isinstance(word, list) and len(word) == 1 for word in words):
                continue
            yield "bad_words_ids of several tokens"
        elif value not in (None, False, [], {}) and value not in _NEUTRAL.get(name, ()):
            yield f"{name}={shown(value, 40)}"
