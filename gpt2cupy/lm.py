"""LanguageModel: tokenizer + model + engine. What ``gpt2cupy.load`` returns."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import loading
from .errors import InputError
from .generation import prompts, scoring
from .generation.request import Request
from .generation.session import Session
from .generation.text import Collected, Completion, GrowingText, Piece, Score
from .ids import check_tokens
from .model import GPT2
from .sampling import SamplingParams
from .tokenizer import Tokenizer


class LanguageModel:
    """A tokenizer, a model and an engine, used as one.

    Made by :func:`gpt2cupy.load`; also a context manager that closes itself. It
    may be used from several threads: calls take turns, each waiting for the one
    before, an open stream included. A call from the thread that has a stream
    open raises :class:`gpt2cupy.errors.BusyError`.

    Parameters
    ----------
    model : GPT2
    tokenizer : Tokenizer
    name : str
    """

    def __init__(self, model: GPT2, tokenizer: Tokenizer, name: str) -> None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"{model.config.vocab_size}",
                where=name,
                remedy="They belong to different checkpoints; pass the right tokenizer=.",
            )
        self._session = Session(model, name)
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config

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
        that wait for their turn end with :class:`gpt2cupy.errors.ClosedError`; a
        score or a forward pass under way is finished first.
        """
        self._session.close()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._session.closed else f"{self.dtype} on {self.device}"
        if not self._session.closed and self.model.backend == "invariant":
            state += ", batch-invariant"
        return f"<LanguageModel {self.name}, {state}>"

    def __reduce__(self) -> Any:
        raise InputError(
            "a LanguageModel is not pickled",
            where=self.name,
            remedy="Call gpt2cupy.load in the other process.",
        )

    # -- generation ------------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Ids of a prompt, checked; an empty one becomes the end-of-text token."""
        return prompts.encode(prompt, self.tokenizer, self.config)

    def stream(
        self,
        prompt: str | Sequence[int] = "",
        params: SamplingParams | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Continue one prompt, yielding a :class:`Piece` per token.

        Parameters
        ----------
        prompt : str or sequence of int
            Text, or token ids. Empty text starts from end-of-text.
        params : SamplingParams, optional
        **options
            Fields of :class:`SamplingParams`, over those of ``params``.
        """
        self._session.check_open()
        chosen = prompts.with_options(params, options)
        if chosen.n != 1:
            raise InputError("stream() yields one continuation", where="n", remedy="Use generate.")
        requests = prompts.make_requests([prompt], chosen, self.tokenizer, self.config)
        return self._stream(requests, chosen)

    def _stream(self, requests: list[Request], params: SamplingParams) -> Iterator[Piece]:
        start = time.perf_counter()
        row, first = GrowingText(self.tokenizer, params.stop), 0.0
        # Closed by name: a traceback may keep this frame, and the turn with it.
        with contextlib.closing(self._session.tokens(requests, 1)) as tokens:
            for count, token in enumerate(tokens):
                now = time.perf_counter()
                first = first or now
                text, reason = row.push(token)
                rate = count / (now - first) if count else 0.0
                yield Piece(text, token.id, token.logprob, reason, first - start, rate, token.top)
                if reason:
                    self._session.drop(token.key)

    def generate(
        self,
        prompt: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] = "",
        params: SamplingParams | None = None,
        *,
        max_batch: int = 16,
        **options: Any,
    ) -> Any:
        """Continue one prompt or many.

        Parameters
        ----------
        prompt : str, sequence of int, or a list of either
            Prompts of a list may differ in length.
        params : SamplingParams, optional
        max_batch : int
            Sequences generated at once; further ones wait for a free slot.
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
        """
        self._session.check_open()
        chosen = prompts.with_options(params, options)
        if not isinstance(max_batch, int) or max_batch < 1:
            raise InputError(
                f"max_batch={max_batch!r} is impossible", where="max_batch", remedy="1 or more."
            )
        single = prompts.is_one(prompt)
        given = [prompt] if single else list(prompt)
        requests = prompts.make_requests(given, chosen, self.tokenizer, self.config)
        found = self._complete(requests, max_batch)
        grouped = [found[i : i + chosen.n] for i in range(0, len(found), chosen.n)]
        results = [group[0] if chosen.n == 1 else group for group in grouped]
        return results[0] if single else results

    def _complete(self, requests: list[Request], max_batch: int) -> list[Completion]:
        rows = {request.key: Collected(self.tokenizer, request) for request in requests}
        with contextlib.closing(self._session.tokens(requests, max_batch)) as tokens:
            for token in tokens:
                if rows[token.key].push(token):
                    self._session.drop(token.key)
        return [row.completion() for row in rows.values()]

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
            Put end-of-text before the text, so that its first token is scored too.

        Returns
        -------
        Score
        """
        window, stride = scoring.check_window(window, stride, self.config)
        ids = prompts.to_ids(text, self.tokenizer)
        ids = ([self.tokenizer.eot_token] if bos else []) + ids
        if len(ids) < 2:
            raise InputError("there is nothing to score", where="text", remedy="Pass more text.")
        tokens = check_tokens(ids, self.config)
        with self._session.turn() as model:
            logprobs = scoring.token_logprobs(model, tokens, window, stride)
        return Score(tokens[1:].tolist(), logprobs)

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
    tokenizer: str | Tokenizer | None = None,
    batch_invariant: bool = False,
    quantize: str | None = None,
) -> LanguageModel:
    """Load a checkpoint as a :class:`LanguageModel`.

    Parameters
    ----------
    name_or_path : str
        "shakespeare" (embedded), an alias (gpt2, gpt2-medium, gpt2-large,
        gpt2-xl, distilgpt2), a hub id, a folder in Hugging Face layout, or an
        llm.c ``.bin`` file.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        "auto" keeps the stored one on a GPU; the CPU always computes in float32,
        and warns if another one is asked for.
    device : str
        "auto" (the GPU where one can be used), "cpu", "cuda" or "cuda:1".
    revision : str, optional
        Branch, tag or commit of a hub id.
    tokenizer : str or Tokenizer, optional
        Folder or llm.c tokenizer file; by default the checkpoint's own.
    batch_invariant : bool
        Make the bits of what comes out for a prompt the same whatever runs beside it and
        in however many slots; see docs/batch-invariance.md for what it costs.
    quantize : {None, "int8"}
        "int8" holds the matrices in a byte per weight; ``dtype`` is that of all else,
        of activations and cache. The CPU computes with the same rounded weights in
        float32.

    Raises
    ------
    Gpt2CupyError
        One of its kinds, naming what is wrong, where, and the remedy.
    """
    if not isinstance(tokenizer, str | os.PathLike | Tokenizer | None):
        raise InputError(
            f"a tokenizer cannot be a {type(tokenizer).__name__}",
            where="tokenizer",
            remedy="Pass a folder, a file or a Tokenizer.",
        )
    options: Any = {"dtype": dtype, "device": device, "revision": revision, "quantize": quantize}
    model, source = loading.load_model(name_or_path, **options, batch_invariant=batch_invariant)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_path(source.path if tokenizer is None else tokenizer)
    return LanguageModel(model, tokenizer, source.name)
