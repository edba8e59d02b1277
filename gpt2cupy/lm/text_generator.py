"""The ways to continue prompts: pieces as they come, or whole texts, blocking or for asyncio."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from typing import Any, Literal, overload

from ..generation import continuations, lists
from ..generation.text import Completion, Piece
from ..sampling import SamplingParams
from .loaded_model import LoadedModel


class TextGenerator(LoadedModel):
    """A loaded model that continues prompts."""

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
        asked = lists.asked(
            self._encoder, prompt, params, options,
            max_batch=max_batch, generation_config=generation_config, one=True,
        )  # fmt: skip
        found = continuations.pieces(self._session, self.tokenizer, asked.groups, asked.slots)
        return _of_one(found) if asked.single else found

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
        asked = lists.asked(
            self._encoder, prompt, params, options,
            max_batch=max_batch, generation_config=generation_config,
        )  # fmt: skip
        model, slots = (self._session, self.tokenizer), asked.slots
        if (groups := asked.known) is None:
            return continuations.one_by_one(*model, asked.groups, slots, progress)
        return continuations.complete(
            *model, groups, slots, asked.given, progress, single=asked.single
        )

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
        self._session.check_open()
        asked = lists.asked(
            self._encoder, prompt, params, options,
            max_batch=max_batch, generation_config=generation_config, at_once=True,
        )  # fmt: skip
        groups = asked.known or []
        found = await self._owner.completions(groups, asked.slots)
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
        self._session.check_open()
        asked = lists.asked(
            self._encoder, prompt, params, options,
            max_batch=max_batch, generation_config=generation_config, one=True, at_once=True,
        )  # fmt: skip
        found = self._owner.pieces(asked.known or [], asked.slots)
        return _aone(found) if asked.single else found


def _of_one(found: Generator[tuple[int, Piece], None, None]) -> Iterator[Piece]:
    """The pieces of one prompt."""
    # Closed by name: Python 3.12.3 clears no frame of a generator that is closed at a yield outside
    # every with and try, and what the frame reads would keep the model.
    with contextlib.closing(found):
        for _, piece in found:
            yield piece


async def _aone(found: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[Piece]:
    """The pieces of one prompt, for asyncio."""
    async with contextlib.aclosing(found):  # type: ignore[type-var]
        async for _, piece in found:
            yield piece
