"""LanguageModel, what ``gpt2cupy.load`` returns: generation, batches, scores and logits."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, overload

from ..generation import lists, scored_texts
from ..generation.batch import Batch, BatchSummary
from ..generation.batch_file import BatchInput, BatchOutput, path_of
from ..generation.progress import bar
from ..generation.text import Score
from .text_generator import TextGenerator


class LanguageModel(TextGenerator):
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
        in which they come. An incomplete file of answers is continued. Memory grows by nine bytes
        a request.

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
            with bar(progress, len(given), long=True, unit="request", initial=before) as done:
                return batch.run(done)

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
        return scored_texts.score(
            self._session, self._encoder, text,
            window=window, stride=stride, bos=bos, progress=progress,
        )  # fmt: skip

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
