"""A model in memory with its tokenizer: where it runs, its tokens and text, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from ..errors import InputError
from ..generation.asynchronous import Owner
from ..generation.generation_config import GenerationConfig
from ..generation.prompt_forms import only_ids
from ..generation.prompts import PromptEncoder
from ..generation.session import Session
from ..generation.text import GrowingText
from ..ids import check_tokens
from ..model import GPT2
from ..tokenizer import Tokenizer

Own = TypeVar("Own", bound="LoadedModel")


class LoadedModel:
    """What a :class:`gpt2cupy.LanguageModel` holds, and what it says of itself.

    Parameters are those of :class:`gpt2cupy.LanguageModel`.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        name: str,
        generation: GenerationConfig | None = None,
        *,
        defaults_from_file: bool = False,
        prefix_cache: bool = False,
    ) -> None:
        # Added tokens that the model does not have are errors where they are met.
        if tokenizer.ordinary_size > model.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.ordinary_size} tokens, the model "
                f"{model.config.vocab_size}",
                where=name,
                remedy="They belong to different checkpoints; pass the right tokenizer=.",
            )
        self._session = Session(model, name, prefix_cache=prefix_cache)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config
        self.generation_config = generation or GenerationConfig()
        self._encoder = PromptEncoder(
            tokenizer, self.config, self.generation_config, defaults_from_file=defaults_from_file
        )
        self._owner = Owner(self._session, tokenizer)

    # -- state -----------------------------------------------------------------------------------

    @property
    def model(self) -> GPT2:
        """The forward pass alone."""
        return self._session.model

    @property
    def device(self) -> str:
        """``cpu``, or ``cuda:0`` with the GPU's name."""
        xp, gpu = self.model.xp, self._session.gpu
        if gpu is None:
            return "cpu"
        return f"cuda:{gpu} ({xp.cuda.runtime.getDeviceProperties(gpu)['name'].decode()})"

    @property
    def dtype(self) -> np.dtype:
        return self.model.dtype

    @property
    def most_slots(self) -> int:
        """Sequences to generate at once, as :meth:`batch` takes them by default.

        16 on the CPU; on a GPU a power of two up to 256 that fits half of its free memory.
        """
        return self._session.most_slots()

    def close(self) -> None:
        """Free the weights and the cache; the object cannot be used afterwards.

        A stream that is open, a generation under way in another thread, and calls
        that wait end with :class:`gpt2cupy.errors.ClosedError`; a
        score or a forward pass under way is finished first.
        """
        self._session.close()

    def __enter__(self: Own) -> Own:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._session.closed or self._session.lost:
            state = "closed" if self._session.closed else "of the parent process"
            return f"<{type(self).__name__} {self.name}, {state}>"
        state = f"{self.dtype} on {self.device}"
        if self.model.backend == "invariant":
            state += ", batch-invariant"
        return f"<{type(self).__name__} {self.name}, {state}>"

    def __reduce__(self) -> Any:
        raise InputError(
            f"a {type(self).__name__} is not pickled",
            where=self.name,
            remedy="Call gpt2cupy.load in the other process.",
        )

    # -- tokens and text --------------------------------------------------------------------------

    @property
    def bos_token_id(self) -> int:
        """The token from which an empty prompt starts.

        That of generation_config.json, else of config.json, else the tokenizer's.
        """
        return self._encoder.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a text, from the same files in the same order."""
        return self._encoder.eos_token_ids

    def encode(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Ids of a prompt, checked; an empty one becomes the beginning-of-text token."""
        return self._encoder.encode(prompt)

    def decode(self, ids: Any) -> str:
        """Text of ids; those that have none, and bytes that are not UTF-8, become U+FFFD."""
        tokens = check_tokens(only_ids(ids), self.config)
        row = GrowingText(self.tokenizer, ())
        return "".join(map(row.decode, tokens.tolist())) + row.decoder.flush()
