"""From what a user passes to generate() and score() to checked token ids and settings."""

from __future__ import annotations

import dataclasses
import itertools
import secrets
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..config import GPT2Config
from ..errors import ConfigError, Gpt2CupyError, InputError, kind_of, not_a_flag, shown
from ..ids import check_tokens
from ..sampling import SamplingParams
from ..tokenizer import Tokenizer
from .generation_config import GenerationConfig
from .prompt_forms import place_of, to_ids
from .request import Request

_SEED_BITS = 53  # of a seed that is drawn: a number of JSON holds it exactly


class PromptEncoder:
    """Makes requests of prompts, with the beginnings and ends of a checkpoint.

    Where its files disagree, generation_config.json goes first, then config.json, then
    the tokenizer, as in ``generate`` of transformers.

    Parameters
    ----------
    tokenizer : Tokenizer
    config : GPT2Config
    generation : GenerationConfig
    defaults_from_file : bool
        Whether the defaults are those of ``generation`` where a call does not say.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: GPT2Config,
        generation: GenerationConfig,
        *,
        defaults_from_file: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.generation = generation
        self._defaults_from_file = defaults_from_file

    @property
    def bos_token_id(self) -> int:
        """The token from which an empty prompt starts."""
        for known in (self.generation.bos_token_id, self.config.bos_token_id):
            if known is not None:
                return known
        return self._of_tokenizer("bos_token")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, where a request does not say."""
        known = self.generation.eos_token_ids or self.config.eos_token_ids
        if known:
            return known
        try:
            end = self._of_tokenizer("eos_token")
        except Gpt2CupyError:  # it has none
            return ()
        return (end,) if end < self.config.vocab_size else ()

    def _of_tokenizer(self, role: str) -> int:
        """What the tokenizer's files say of a token, else its end-of-text token."""
        known: dict[str, int] = getattr(self.tokenizer, "special_tokens", {})
        if role in known:
            return known[role]
        return self.tokenizer.eot_token

    def encode(self, prompt: Any) -> np.ndarray:
        """Ids [T] of a prompt, checked; an empty one becomes the beginning-of-text token."""
        ids = to_ids(prompt, self.tokenizer)
        ids = ids if len(ids) else [self.bos_token_id]
        if len(ids) > self.config.n_positions:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context {self.config.n_positions}",
                where="prompt",
                remedy="Shorten the prompt.",
            )
        return check_tokens(ids, self.config)

    def from_file(self, asked: bool | None) -> bool:
        """Whether a call's defaults are those of generation_config.json."""
        if asked is not None and not isinstance(asked, bool | np.bool_):
            raise not_a_flag("generation_config", asked)
        return self._defaults_from_file if asked is None else bool(asked)

    def params(
        self, params: SamplingParams | None, options: dict[str, Any], from_file: bool
    ) -> SamplingParams:
        """``params``, or the defaults, with single fields replaced.

        Parameters
        ----------
        params : SamplingParams or None
        options : dict
        from_file : bool
            Whether the defaults are those of generation_config.json.
        """
        if params is None and from_file:
            params = self._file_params()
        return with_options(params, options)

    def _file_params(self) -> SamplingParams:
        """The settings of generation_config.json; what it asks that we lack is a warning."""
        found = self.generation
        if found.lacking:
            warnings.warn(
                f"not supported and left out: {', '.join(found.lacking)} ({found.where})",
                RuntimeWarning,
                stacklevel=6,  # who calls generate() or stream()
            )
        try:
            return SamplingParams(**found.settings)
        except InputError as error:
            raise ConfigError(error.what, where=found.where, remedy=error.remedy) from error

    def requests(
        self, prompts: Sequence[Any], params: SamplingParams, *, single: bool
    ) -> list[Request]:
        """``params.n`` requests for each prompt, with keys (number of the prompt, continuation).

        Parameters
        ----------
        prompts : sequence
        params : SamplingParams
        single : bool
            Whether errors need not say which prompt they mean.

        Raises
        ------
        InputError
            If prompt and new tokens do not fit the context, or an id is unknown.
        """
        groups = self.groups(prompts, itertools.repeat(params), single=single)
        return [request for group in groups for request in group]

    def groups(
        self, prompts: Iterable[Any], params: Iterable[SamplingParams], *, single: bool = False
    ) -> Iterator[list[Request]]:
        """The requests of each prompt, made when they are asked for; as :meth:`requests`.

        Parameters
        ----------
        prompts : iterable
        params : iterable of SamplingParams
            At least as many; ``n`` of each is the number of its requests.
        single : bool
        """
        known: SamplingParams | None = None
        ends: tuple[int, ...] = ()
        for number, (prompt, own) in enumerate(zip(prompts, params, strict=False)):
            if own is not known:
                known, ends = own, self._ends(own)
                if own.stop:
                    self.tokenizer.require()
            try:
                ids = self._fitting(prompt, own)
            except Gpt2CupyError as error:
                if single:
                    raise
                place = place_of(number, prompt)
                if error.where not in ("", "prompt", "ids"):
                    place += f"; {error.where}"
                raise type(error)(error.what, where=place, remedy=error.remedy) from error
            if own.seed is None and not own.greedy:
                own = own.with_seed(secrets.randbits(_SEED_BITS))
            yield [Request((number, i), ids, own, index=i, eos=ends) for i in range(own.n)]

    def _fitting(self, prompt: Any, params: SamplingParams) -> np.ndarray:
        ids = self.encode(prompt)
        room = self.config.n_positions + 1 - len(ids)
        if params.must_fit > room:
            name = "min" if params.must_fit != params.max_new_tokens else "max"
            raise InputError(
                f"{len(ids)} {'token' if len(ids) == 1 else 'tokens'} of prompt and "
                f"{params.must_fit} new ones exceed the context of {self.config.n_positions}",
                where="prompt",
                remedy=f"{room} new {'token fits' if room == 1 else 'tokens fit'}: lower "
                f"{name}_new_tokens or shorten the prompt.",
            )
        return ids

    def _ends(self, params: SamplingParams) -> tuple[int, ...]:
        """The tokens that end these requests, all of them and those of the bias checked."""
        given, size = params.eos_token_id, self.config.vocab_size
        if given is None:
            ends = self.eos_token_ids
        else:
            several = (given,) if isinstance(given, int) else tuple(given)
            ends = tuple(id_ for id_ in several if id_ >= 0)
        named = {"eos_token_id": ends, "stop_token_ids": params.stop_token_ids}
        for name, ids in {**named, "logit_bias": tuple(params.logit_bias)}.items():
            if max(ids, default=0) >= size:
                raise InputError(
                    f"token id {max(ids)} is outside the vocabulary of {size}",
                    where=name,
                    remedy="Use ids of this model.",
                )
        held_back = {*ends, *params.stop_token_ids} if params.min_new_tokens else set()
        if len(params.banned | held_back) >= size:
            raise InputError(
                "every token of the vocabulary is banned",
                where="logit_bias",
                remedy="Leave some, beside those that end the text.",
            )
        return ends


def with_options(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    """``params``, or the defaults, with single fields replaced."""
    if params is not None and not isinstance(params, SamplingParams):
        raise InputError(
            f"params cannot be {kind_of(params)}",
            where="params",
            remedy="Pass SamplingParams(...), or its fields as keyword arguments.",
        )
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := set(options) - names:
        raise InputError(
            f"unknown sampling option {shown(sorted(unknown)[0])}",
            where="SamplingParams",
            remedy=f"Options: {', '.join(sorted(names))}.",
        )
    return dataclasses.replace(params or SamplingParams(), **options)


def warn_of_idle(settings: Iterable[SamplingParams]) -> None:
    """Warn who called LanguageModel of settings that change nothing in greedy decoding."""
    idle = dict.fromkeys(name for params in settings for name in params.without_effect())
    if idle:
        verb = "does" if len(idle) == 1 else "do"
        warnings.warn(
            f"{', '.join(idle)} {verb} nothing without a temperature: decoding is greedy",
            RuntimeWarning,
            stacklevel=4,
        )
