"""LanguageModel: tokenizer + model + engine. What ``gpt2cupy.load`` returns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np

from . import loading
from .errors import InputError, NoTokenizerError, kind_of, shown
from .generation import continuations, prompts, scoring
from .generation.generation_config import GenerationConfig
from .generation.session import Session
from .generation.text import Completion, GrowingText, Piece, Score
from .ids import check_tokens
from .model import GPT2, check_batch_invariant
from .sampling import SamplingParams
from .tokenizer import NoTokenizer, Tokenizer


class LanguageModel:
    """A tokenizer, a model and an engine, used as one.

    Made by :func:`gpt2cupy.load`; also a context manager that closes itself. It
    may be used from several threads: it serves one call at a time, and other calls
    wait for the one before, an open stream included. A call from the thread that has a stream
    open raises :class:`gpt2cupy.errors.BusyError`.

    Parameters
    ----------
    model : GPT2
    tokenizer : Tokenizer
    name : str
    generation : GenerationConfig, optional
        What the checkpoint's generation_config.json says.
    defaults_from_file : bool
        Whether its settings are the defaults of requests.
    prefix_cache : bool
        As in :func:`gpt2cupy.load`.
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
        self._defaults_from_file = defaults_from_file
        self._encoder = prompts.PromptEncoder(tokenizer, self.config, self.generation_config)

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

    def close(self) -> None:
        """Free the weights and the cache; the object cannot be used afterwards.

        A stream that is open, a generation under way in another thread, and calls
        that wait end with :class:`gpt2cupy.errors.ClosedError`; a
        score or a forward pass under way is finished first.
        """
        self._session.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        if self._session.closed or self._session.lost:
            state = "closed" if self._session.closed else "of the parent process"
            return f"<LanguageModel {self.name}, {state}>"
        state = f"{self.dtype} on {self.device}"
        if self.model.backend == "invariant":
            state += ", batch-invariant"
        return f"<LanguageModel {self.name}, {state}>"

    def __reduce__(self) -> Any:
        raise InputError(
            "a LanguageModel is not pickled",
            where=self.name,
            remedy="Call gpt2cupy.load in the other process.",
        )

    # -- generation ------------------------------------------------------------------------------

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
        tokens = check_tokens(prompts.only_ids(ids), self.config)
        row = GrowingText(self.tokenizer, ())
        return "".join(map(row.decode, tokens.tolist())) + row.decoder.flush()

    def stream(
        self,
        prompt: str | Sequence[int] = "",
        params: SamplingParams | None = None,
        *,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Continue one prompt, yielding a :class:`Piece` per token.

        Parameters
        ----------
        prompt : str or sequence of int
            Text, or token ids, as :meth:`generate` takes them. Empty text starts from
            ``bos_token_id``.
        params : SamplingParams, optional
        generation_config : bool, optional
            As in :meth:`generate`.
        **options
            Fields of :class:`SamplingParams`, over those of ``params``.

        Raises
        ------
        InputError
            If prompt and new tokens do not fit the context, or an id is unknown.
        NonFiniteError
            If logits are not finite, in place of the piece that they would have given.
        """
        self._session.check_open()
        chosen = self._encoder.params(params, options, self._from_file(generation_config))
        if chosen.n != 1:
            raise InputError("stream() yields one continuation", where="n", remedy="Use generate.")
        if not prompts.is_one(prompt):
            raise InputError(
                "stream() continues one prompt, and this is a list",
                where="prompt",
                remedy="Use generate() for a list.",
            )
        prompts.warn_of_idle(chosen)
        (request,) = self._encoder.requests([prompt], chosen, single=True)
        return continuations.pieces(self._session, self.tokenizer, request)

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] = "",
        params: SamplingParams | None = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        n: Literal[1] = 1,
        **options: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...] | Sequence[Sequence[int]],
        params: SamplingParams | None = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        n: Literal[1] = 1,
        **options: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: Any = "",
        params: SamplingParams | None = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Any: ...

    def generate(
        self,
        prompt: Any = "",
        params: SamplingParams | None = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Any:
        """Continue one prompt or many.

        Parameters
        ----------
        prompt : str, sequence of int, or a list of either
            Prompts of a list may differ in length. Ids may be a list, an array of NumPy
            or CuPy, a tensor of PyTorch, or what a tokenizer of transformers returns.
        params : SamplingParams, optional
        max_batch : int
            Sequences generated at once; further ones wait for a free slot.
        generation_config : bool, optional
            Whether the checkpoint's generation_config.json has the defaults; as given to
            :func:`gpt2cupy.load` if left out. ``params`` goes before it as a whole, and
            options go before both. Its beginning and ends of texts are always used.
        **options
            Fields of :class:`SamplingParams`, over those of ``params``.

        Returns
        -------
        Completion
            For one prompt; a list of ``n`` of them where ``n`` > 1; for a list
            of prompts, the list of these.

        Raises
        ------
        InputError
            If prompt and new tokens do not fit the context, or an id is unknown.
        NonFiniteError
            If logits are not finite. The others are finished first, and are its
            ``completions``.
        """
        self._session.check_open()
        chosen = self._encoder.params(params, options, self._from_file(generation_config))
        if not isinstance(max_batch, int | np.integer) or max_batch < 1:
            raise InputError(
                f"max_batch={shown(max_batch)} is impossible",
                where="max_batch",
                remedy="It must be an integer, 1 or more.",
            )
        prompts.warn_of_idle(chosen)
        single = prompts.is_one(prompt)
        given = [prompt] if single else prompts.several(prompt)
        requests = self._encoder.requests(given, chosen, single=single)
        return continuations.complete(
            self._session, self.tokenizer, requests, int(max_batch), given, single=single
        )

    def _from_file(self, asked: bool | None) -> bool:
        """Whether the defaults are those of generation_config.json."""
        if asked is not None and not isinstance(asked, bool | np.bool_):
            raise _not_a_flag("generation_config", asked)
        return self._defaults_from_file if asked is None else bool(asked)

    # -- scoring ---------------------------------------------------------------------------------

    def score(
        self,
        text: str | Sequence[int],
        *,
        window: int | None = None,
        stride: int | None = None,
        bos: bool = True,
    ) -> Score:
        """Log-probability of every token of a text, by a sliding window.

        Parameters
        ----------
        text : str or sequence of int
        window : int, optional
            Tokens of a window; ``n_positions`` by default.
        stride : int, optional
            How far each window moves; half a window by default. A window scores
            only tokens that the one before did not.
        bos : bool
            Put ``bos_token_id`` before the text, so that its first token is scored too.

        Returns
        -------
        Score

        Raises
        ------
        InputError
            If there is nothing to score, or an id is unknown.
        NonFiniteError
            If logits are not finite.
        """
        if not isinstance(bos, bool | np.bool_):
            raise _not_a_flag("bos", bos)
        window, stride = scoring.check_window(window, stride, self.config)
        if not prompts.is_one(text):
            raise InputError(
                "score() takes one text, and this is a list",
                where="text",
                remedy="Call it once for each.",
            )
        ids = [*self._first(bos), *prompts.to_ids(text, self.tokenizer)]
        if len(ids) < 2:
            raise InputError("there is nothing to score", where="text", remedy="Pass more text.")
        tokens = check_tokens(ids, self.config)
        with self._session.turn() as model:
            logprobs = scoring.token_logprobs(model, tokens, window, stride)
        return Score(tokens[1:].tolist(), logprobs)

    def _first(self, bos: bool) -> list[int]:
        """What stands before a text that is scored."""
        try:
            return [self.bos_token_id] if bos else []
        except NoTokenizerError as error:
            raise InputError(
                "no file of this model names a beginning-of-text token",
                where="bos",
                remedy="Pass bos=False, or put the token before the ids yourself.",
            ) from error

    def __call__(self, ids: Any) -> Any:
        """Logits of every position: ids [B, T] -> float32 [B, T, V] on the model's device."""
        with self._session.turn() as model:
            return model(ids)

    def hidden_states(self, ids: Any) -> Any:
        """Hidden states of every layer, on the device: ids [B, T] -> float32 [L + 1, B, T, C].

        See :meth:`GPT2.hidden_states`.
        """
        with self._session.turn() as model:
            return model.hidden_states(ids)


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
        Folder or llm.c tokenizer file; by default the checkpoint's own. Without one
        that can be read the model takes and returns token ids, and text raises.
    batch_invariant : bool
        Make the bits of what comes out for a prompt the same whatever runs beside it and
        in however many slots; see docs/batch-invariance.md for what it costs.
    quantize : {None, "int8"}
        "int8" holds the matrices in a byte per weight; ``dtype`` is that of all else,
        of activations and cache. The CPU computes with the same rounded weights in
        float32.
    generation_config : bool
        Take the defaults of :class:`SamplingParams` from the checkpoint's
        generation_config.json, and warn of what it asks that is not supported. Which
        tokens end a text is read from it in any case.
    prefix_cache : bool
        Let a prompt take its beginning from an earlier call's, as far as it is still in
        memory: for dialogues. A second call may then have other last bits than the first.
        Prompts of one call share what they begin with in any case.

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
        raise _not_a_flag("generation_config", generation_config)
    if not isinstance(prefix_cache, bool):
        raise _not_a_flag("prefix_cache", prefix_cache)
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


def _not_a_flag(name: str, value: object) -> InputError:
    return InputError(f"{name} is {shown(value)}", where=name, remedy="Use True or False.")
