"""LanguageModel: tokenizer + model + engine. What ``gpt2cupy.load`` returns."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

import numpy as np

from . import loading
from .errors import InputError, NoTokenizerError, kind_of, shown
from .generation import continuations, lists, prompts, scoring
from .generation.asynchronous import Owner
from .generation.batch import Batch, BatchSummary
from .generation.batch_file import BatchInput, BatchOutput, path_of
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
        """Sequences that may well be generated at once: what :meth:`batch` takes by default.

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

    @overload
    def stream(
        self,
        prompt: str | Sequence[int] = "",
        params: SamplingParams | None = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Iterator[Piece]: ...

    @overload
    def stream(
        self,
        prompt: list[str] | tuple[str, ...] | Sequence[Sequence[int]] | Iterator[Any],
        params: lists.Params = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Iterator[tuple[int, Piece]]: ...

    def stream(
        self,
        prompt: Any = "",
        params: lists.Params = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Iterator[Any]:
        """Continue one prompt or many, yielding a :class:`Piece` per token.

        Parameters
        ----------
        prompt : str, sequence of int, or a list or iterator of either
            As :meth:`generate` takes them. Empty text starts from ``bos_token_id``.
        params : SamplingParams, or one for each prompt, optional
        max_batch : int
            Texts generated at once, of several.
        generation_config : bool, optional
            As in :meth:`generate`.
        **options
            Fields of :class:`SamplingParams`, over those of ``params``.

        Yields
        ------
        Piece
            Of one prompt; of a list or an iterator, pairs of the prompt's number and a piece,
            as they come.

        Raises
        ------
        InputError
            If prompt and new tokens do not fit the context, or an id is unknown.
        NonFiniteError
            If logits are not finite, in place of the piece that they would have given; of
            several texts, when the others are done.
        """
        self._session.check_open()
        from_file, slots = self._from_file(generation_config), lists.check_max_batch(max_batch)
        asked = lists.asked(self._encoder, prompt, params, options, from_file=from_file, one=True)
        prompts.warn_of_idle(asked.settings)
        found = continuations.pieces(self._session, self.tokenizer, asked.groups, slots)
        return (piece for _, piece in found) if asked.single else found

    @overload
    def generate(
        self,
        prompt: str | Sequence[int] = "",
        params: SamplingParams | None = None,
        *,
        max_batch: int = 16,
        progress: bool | None = None,
        generation_config: bool | None = None,
        n: Literal[1] = 1,
        **options: Any,
    ) -> Completion: ...

    @overload
    def generate(
        self,
        prompt: list[str] | tuple[str, ...] | Sequence[Sequence[int]],
        params: lists.Params = None,
        *,
        max_batch: int = 16,
        progress: bool | None = None,
        generation_config: bool | None = None,
        n: Literal[1] = 1,
        **options: Any,
    ) -> list[Completion]: ...

    @overload
    def generate(
        self,
        prompt: Any = "",
        params: lists.Params = None,
        *,
        max_batch: int = 16,
        progress: bool | None = None,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Any: ...

    def generate(
        self,
        prompt: Any = "",
        params: lists.Params = None,
        *,
        max_batch: int = 16,
        progress: bool | None = None,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Any:
        """Continue one prompt or many.

        Parameters
        ----------
        prompt : str, sequence of int, or a list or iterator of either
            Prompts of a list may differ in length. Ids may be a list, an array of NumPy
            or CuPy, a tensor of PyTorch, or what a tokenizer of transformers returns. An
            iterator, such as a generator or an open file, is read as slots become free.
        params : SamplingParams, or one for each prompt, optional
        max_batch : int
            Sequences generated at once; further ones wait for a free slot.
        progress : bool, optional
            Whether a bar on stderr shows how many texts are finished; left out, it does on a
            terminal for a list of more texts than ``max_batch``.
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
            of prompts, the list of these; for an iterator, an iterator over these in the
            order of the prompts, which holds a bounded number of them in memory.

        Raises
        ------
        InputError
            If prompt and new tokens do not fit the context, or an id is unknown. For an
            iterator, when the completions of the prompts before have been given.
        NonFiniteError
            If logits are not finite. The others are finished first, and are its
            ``completions``; for an iterator it stands in the place of the completion.
        """
        self._session.check_open()
        from_file, slots = self._from_file(generation_config), lists.check_max_batch(max_batch)
        asked = lists.asked(self._encoder, prompt, params, options, from_file=from_file)
        prompts.warn_of_idle(asked.settings)
        if (groups := asked.known) is None:
            return self._one_by_one(asked, slots, progress)
        model, count = (self._session, self.tokenizer), sum(map(len, groups))
        with lists.bar(progress, count, long=count > slots) as done:
            return continuations.complete(
                *model, groups, slots, asked.given, done, single=asked.single
            )

    def _one_by_one(self, asked: lists.Asked, slots: int, progress: bool | None) -> Iterator[Any]:
        """The completions of an iterator of prompts."""
        with lists.bar(progress, None, long=False) as done:
            yield from continuations.one_by_one(
                self._session, self.tokenizer, asked.groups, slots, done
            )

    def _from_file(self, asked: bool | None) -> bool:
        """Whether the defaults are those of generation_config.json."""
        if asked is not None and not isinstance(asked, bool | np.bool_):
            raise _not_a_flag("generation_config", asked)
        return self._defaults_from_file if asked is None else bool(asked)

    async def agenerate(
        self,
        prompt: Any = "",
        params: lists.Params = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        **options: Any,
    ) -> Any:
        """:meth:`generate` for asyncio: calls of many tasks run side by side in one engine.

        A task that is cancelled ends its requests, and those of no other. While such calls run,
        other calls of this model wait for all of them.

        Parameters
        ----------
        prompt, params, generation_config, **options
            As in :meth:`generate`; no iterator.
        max_batch : int
            Sequences generated at once. What runs already keeps its number, and further
            sequences wait for a free slot.

        Returns
        -------
        Completion
            Or lists, as :meth:`generate`.

        Raises
        ------
        InputError, NonFiniteError
            As :meth:`generate`.
        BusyError
            If a stream of :meth:`stream` is open in this thread.
        """
        asked, slots = self._asked(prompt, params, options, generation_config, max_batch)
        groups = asked.known or []
        found = await self._owner.completions(groups, slots)
        return continuations.as_given(
            self._session, groups, found, asked.given, single=asked.single
        )

    def astream(
        self,
        prompt: Any = "",
        params: lists.Params = None,
        *,
        max_batch: int = 16,
        generation_config: bool | None = None,
        **options: Any,
    ) -> AsyncIterator[Any]:
        """:meth:`stream` for asyncio: calls of many tasks run side by side in one engine.

        Its requests end when the iterator is closed, or the task that reads it is cancelled.

        Parameters
        ----------
        prompt, params, max_batch, generation_config, **options
            As in :meth:`agenerate`.

        Returns
        -------
        asynchronous iterator of Piece
            Of one prompt; of a list, of pairs of the prompt's number and a piece.

        Raises
        ------
        InputError, NonFiniteError
            As :meth:`stream`.
        """
        asked, slots = self._asked(prompt, params, options, generation_config, max_batch, one=True)
        found = self._owner.pieces(asked.known or [], slots)
        return _alone(found) if asked.single else found

    def _asked(
        self,
        prompt: Any,
        params: lists.Params,
        options: dict[str, Any],
        generation_config: bool | None,
        max_batch: Any,
        *,
        one: bool = False,
    ) -> tuple[lists.Asked, int]:
        """What a call of asyncio asks for, checked, and the slots."""
        self._session.check_open()
        if isinstance(prompt, Iterator):
            raise InputError(
                "an iterator of prompts is read by generate() and stream() alone",
                where="prompt",
                remedy="Call once for each prompt: the calls of many tasks run side by side.",
            )
        from_file, slots = self._from_file(generation_config), lists.check_max_batch(max_batch)
        asked = lists.asked(self._encoder, prompt, params, options, from_file=from_file, one=one)
        prompts.warn_of_idle(asked.settings)
        return asked, slots

    def batch(
        self,
        requests: str | os.PathLike[str],
        answers: str | os.PathLike[str],
        *,
        max_batch: int | None = None,
        progress: bool | None = None,
    ) -> BatchSummary:
        """Answer a file of completion requests in OpenAI's batch format.

        Each line of ``requests`` is an object with ``custom_id``, ``method`` ("POST"), ``url``
        ("/v1/completions") and ``body``; docs/batch.md has the fields of a body. Each line of
        ``answers`` has the ``custom_id``, the ``response`` and the ``error`` of one, in the order
        in which they come. A file of answers that is not complete is gone on with. Memory grows
        by nine bytes a request.

        Parameters
        ----------
        requests, answers : path
        max_batch : int, optional
            Sequences generated at once; :attr:`most_slots` by default.
        progress : bool, optional
            Whether a bar on stderr shows how many are answered; left out, it does on a terminal.

        Returns
        -------
        BatchSummary

        Raises
        ------
        InputError
            If two requests have the same ``custom_id``, a file cannot be read, or the answers
            belong to other requests or another model. A request that fails alone is an error in
            its line.
        """
        self._session.check_open()
        slots = self.most_slots if max_batch is None else max_batch
        slots = lists.check_max_batch(slots)
        given = BatchInput(path_of(requests, "requests"))
        with BatchOutput(path_of(answers, "answers"), given, self.name) as output:
            batch = Batch(self._session, self._encoder, self.name, given, output, slots)
            before = batch.summary.before
            with lists.bar(progress, len(given), long=True, unit="request", initial=before) as done:
                return batch.run(done)

    # -- scoring ---------------------------------------------------------------------------------

    @overload
    def score(
        self,
        text: str | Sequence[int],
        *,
        window: int | None = None,
        stride: int | None = None,
        bos: bool = True,
        progress: bool | None = None,
    ) -> Score: ...

    @overload
    def score(
        self,
        text: list[str] | list[tuple[str, str]] | Sequence[Sequence[Any]],
        *,
        window: int | None = None,
        stride: int | None = None,
        bos: bool = True,
        progress: bool | None = None,
    ) -> list[Score]: ...

    @overload
    def score(
        self,
        text: Any,
        *,
        window: int | None = None,
        stride: int | None = None,
        bos: bool = True,
        progress: bool | None = None,
    ) -> Any: ...

    def score(
        self,
        text: Any,
        *,
        window: int | None = None,
        stride: int | None = None,
        bos: bool = True,
        progress: bool | None = None,
    ) -> Any:
        """Log-probability of every token of one text or many.

        Many run packed, without padding. Of a pair (context, continuation) the tokens of the
        continuation alone are scored, which is what multiple-choice benchmarks compare.

        Parameters
        ----------
        text : str, sequence of int, or a list or iterator of these or of pairs
            A pair is a tuple of two, each text or token ids. Two texts are encoded as one; a
            token that has a part in both belongs to the continuation.
        window : int, optional
            Tokens of a window; ``n_positions`` by default. A context that is too long for it
            loses its beginning.
        stride : int, optional
            How far each window moves; half a window by default. A window scores
            only tokens that the one before did not.
        bos : bool
            Put ``bos_token_id`` before the text, so that its first token is scored too.
        progress : bool, optional
            Whether a bar on stderr shows how many are scored; left out, it does on a terminal
            for a list of more than 1,000.

        Returns
        -------
        Score
            Of one text; for a list the list of these, for an iterator an iterator over these.

        Raises
        ------
        InputError
            If there is nothing to score, or an id is unknown.
        NonFiniteError
            If logits are not finite. The others of a list are scored first, and are its
            ``completions``; for an iterator it stands in the place of the score.
        """
        self._session.check_open()
        if not isinstance(bos, bool | np.bool_):
            raise _not_a_flag("bos", bos)
        size = scoring.check_window(window, stride, self.config)
        encode = lists.ScoredEncoder(self.tokenizer, self.config, self._first(bos))
        if isinstance(text, Iterator):
            return self._scores_of(map(encode.numbered, itertools.count(), text), *size, progress)
        if isinstance(text, tuple) and list(map(type, text)) == [str, str]:
            raise InputError(
                "a pair by itself could also be two texts",
                where="score: text",
                remedy="Write [(context, continuation)] for a pair, and a list for two texts.",
            )
        single = prompts.is_one(text)
        given = [text] if single else prompts.several(text)
        # Made while the GPU runs those before: an error may come after some passes.
        tokens = (encode(text),) if single else map(encode.numbered, itertools.count(), given)
        with lists.bar(progress, len(given), long=len(given) > 1000) as done:
            found = list(self._scores(tokens, *size, done))
        failed = tuple((i, 0) for i, each in enumerate(found) if each is None)
        result = found[0] if single else found
        if failed:
            where = "score" if single else prompts.place_of(failed[0][0], given[failed[0][0]])
            raise scoring.non_finite(self.model, where, completions=result, failed=failed)
        return result

    def _scores(
        self,
        tokens: Iterable[tuple[np.ndarray, int]],
        window: int,
        stride: int,
        done: Callable[[int], object],
    ) -> Iterator[Score | None]:
        """The scores of tokens, None where logits are not finite."""

        def scored(model: GPT2) -> Iterator[Score | None]:
            given: deque[np.ndarray] = deque()

            def noted() -> Iterator[tuple[np.ndarray, int]]:
                for ids, first in tokens:
                    given.append(ids[first:])
                    yield ids, first

            scorer = scoring.Scorer(model)
            for logprobs in scoring.token_logprobs(scorer, noted(), window, stride):
                ids = given.popleft()
                done(1)
                yield None if np.isnan(logprobs).any() else Score(ids.tolist(), logprobs)

        return self._session.items(scored)

    def _scores_of(
        self,
        tokens: Iterator[tuple[np.ndarray, int]],
        window: int,
        stride: int,
        progress: bool | None,
    ) -> Iterator[Score]:
        """The scores of an iterator of texts."""
        with lists.bar(progress, None, long=False) as done:
            for number, found in enumerate(self._scores(tokens, window, stride, done)):
                if found is None:
                    raise scoring.non_finite(self.model, f"text {number}", failed=((number, 0),))
                yield found

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


async def _alone(found: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[Piece]:
    """The pieces of one prompt."""
    async with contextlib.aclosing(found):  # type: ignore[type-var]
        async for _, piece in found:
            yield piece


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
