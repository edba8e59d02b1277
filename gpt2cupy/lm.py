"""LanguageModel: tokenizer + model + engine. What ``gpt2cupy.load`` returns."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from . import loading, ops
from .engine import Engine, Request
from .errors import ClosedError, InputError
from .model import GPT2, check_ids, check_tokens
from .sampling import SamplingParams
from .text import Completion, GrowingText, Piece, Score
from .tokenizer import Tokenizer


class LanguageModel:
    """A tokenizer, a model and an engine, used as one.

    Made by :func:`gpt2cupy.load`; also a context manager that closes itself. Calls
    from several threads take turns: a call that finds another under way raises.

    Parameters
    ----------
    model : GPT2
    tokenizer : Tokenizer
    name : str
    """

    def __init__(self, model: GPT2, tokenizer: Tokenizer, name: str) -> None:
        self._model: GPT2 | None = model
        self.tokenizer = tokenizer
        self.name = name
        self.config = model.config
        if tokenizer.vocab_size > model.config.vocab_size:
            raise InputError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, the model "
                f"{model.config.vocab_size}",
                where=name,
                remedy="They belong to different checkpoints; pass the right tokenizer=.",
            )
        self._engine: Engine | None = None
        self._busy = threading.Lock()

    # -- state -----------------------------------------------------------------------------------

    @property
    def model(self) -> GPT2:
        """The forward pass alone."""
        if self._model is None:
            raise ClosedError("this model is closed", where=self.name, remedy="Load it again.")
        return self._model

    @property
    def device(self) -> str:
        """``cpu``, or ``cuda:0`` with the GPU's name."""
        if self.model.xp is np:
            return "cpu"
        index = self.model.weights.wte.device.id
        properties = self.model.xp.cuda.runtime.getDeviceProperties(index)
        return f"cuda:{index} ({properties['name'].decode()})"

    @property
    def dtype(self) -> np.dtype:
        return self.model.dtype

    def close(self) -> None:
        """Free the weights and the cache; the object cannot be used afterwards."""
        on_gpu = self._model is not None and self._model.xp is not np
        self._model = self._engine = None
        if on_gpu:
            import cupy

            cupy.get_default_memory_pool().free_all_blocks()

    def __enter__(self) -> LanguageModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._model is None else f"{self.dtype} on {self.device}"
        return f"<LanguageModel {self.name}, {state}>"

    def __reduce__(self) -> Any:
        raise InputError(
            "a LanguageModel is not pickled",
            where=self.name,
            remedy="Call gpt2cupy.load in the other process.",
        )

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        if not self._busy.acquire(blocking=False):
            raise ClosedError(
                "another call is using this model",
                where=self.name,
                remedy="Finish or close the other stream, or load the model once per thread.",
            )
        try:
            if self.model.xp is np:
                yield
            else:
                with self.model.weights.wte.device:
                    yield
        finally:
            self._busy.release()

    def _engine_for(self, slots: int) -> Engine:
        """The engine, made anew when more slots are asked for than it has."""
        if self._engine is None or self._engine.slots < slots:
            self._engine = None
            self._engine = Engine(self.model, slots)
        return self._engine

    # -- generation ------------------------------------------------------------------------------

    def encode(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Ids of a prompt, checked; an empty one becomes the end-of-text token."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not len(ids):
            ids = [self.tokenizer.eot_token]
        if len(ids) > self.config.n_positions:
            raise InputError(
                f"the prompt has {len(ids)} tokens, the context {self.config.n_positions}",
                where="prompt",
                remedy="Shorten the prompt.",
            )
        return check_tokens(ids, self.config)

    def _requests(self, prompts: Sequence[Any], params: SamplingParams) -> list[Request]:
        eos = params.eos_token_id
        if eos is None:
            eos = -1 if self.config.eos_token_id is None else self.config.eos_token_id
        largest = max([eos, *params.logit_bias], default=-1)
        if largest >= self.config.vocab_size:
            raise InputError(
                f"token id {largest} is outside the vocabulary of {self.config.vocab_size}",
                where="eos_token_id or logit_bias",
                remedy="Use ids of this model.",
            )
        requests = []
        for number, prompt in enumerate(prompts):
            ids = self.encode(prompt)
            wanted = params.max_new_tokens
            if wanted is not None and len(ids) + wanted > self.config.n_positions + 1:
                raise InputError(
                    f"{len(ids)} tokens of prompt and {wanted} new ones exceed the context of "
                    f"{self.config.n_positions}",
                    where=f"prompt {number}",
                    remedy="Lower max_new_tokens, or pass None to go on to the end of the context.",
                )
            requests += [
                Request((number, i), ids, params, index=i, eos=eos) for i in range(params.n)
            ]
        return requests

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
        chosen = _with_options(params, options)
        if chosen.n != 1:
            raise InputError("stream() yields one continuation", where="n", remedy="Use generate.")
        requests = self._requests([prompt], chosen)
        return self._stream(requests, chosen)

    def _stream(self, requests: list[Request], params: SamplingParams) -> Iterator[Piece]:
        start = time.perf_counter()
        with self._alone():
            if params.max_new_tokens == 0:
                return
            row = GrowingText(self.tokenizer, params.stop)
            first = 0.0
            engine = self._engine_for(1)
            for count, token in enumerate(engine.run(requests)):
                now = time.perf_counter()
                first = first or now
                text, reason = row.push(token)
                rate = count / (now - first) if count else 0.0
                yield Piece(text, token.id, token.logprob, reason, first - start, rate, token.top)
                if reason:
                    engine.drop(token.key)

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
        chosen = _with_options(params, options)
        if not isinstance(prompt, str | Sequence | np.ndarray):
            raise InputError(
                f"a prompt cannot be a {type(prompt).__name__}",
                where="prompt",
                remedy="Pass text, token ids, or a list of either.",
            )
        first = prompt[0] if len(prompt) else ()
        single = isinstance(prompt, str) or (not isinstance(first, str) and np.ndim(first) == 0)
        requests = self._requests([prompt] if single else list(prompt), chosen)
        found = self._complete(requests, chosen, max_batch)
        grouped = [found[i : i + chosen.n] for i in range(0, len(found), chosen.n)]
        results = [group[0] if chosen.n == 1 else group for group in grouped]
        return results[0] if single else results

    def _complete(
        self, requests: list[Request], params: SamplingParams, max_batch: int
    ) -> list[Completion]:
        rows = {request.key: GrowingText(self.tokenizer, params.stop) for request in requests}
        done = {
            request.key: Completion("", [], [], "length", len(request.prompt), [])
            for request in requests
        }
        with self._alone():
            if requests and params.max_new_tokens != 0:
                engine = self._engine_for(min(max_batch, len(requests)))
                for token in engine.run(requests):
                    text, reason = rows[token.key].push(token)
                    so_far = done[token.key]
                    so_far.tokens.append(token.id)
                    so_far.logprobs.append(token.logprob)
                    so_far.top.append(token.top)
                    done[token.key] = dataclasses.replace(
                        so_far, text=so_far.text + text, finish_reason=reason or "length"
                    )
                    if reason:
                        engine.drop(token.key)
        return list(done.values())

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
        window = self.config.n_positions if window is None else window
        stride = max(window // 2, 1) if stride is None else stride
        if not (1 <= stride <= window <= self.config.n_positions):
            raise InputError(
                f"window {window} with stride {stride} is impossible",
                where="score",
                remedy=f"1 <= stride <= window <= {self.config.n_positions}.",
            )
        ids = self.tokenizer.encode(text) if isinstance(text, str) else list(text)
        ids = ([self.tokenizer.eot_token] if bos else []) + list(ids)
        if len(ids) < 2:
            raise InputError("there is nothing to score", where="text", remedy="Pass more text.")
        tokens = check_tokens(ids, self.config)
        parts, scored = [], 1  # tokens before `scored` have their log-probability
        with self._alone():
            for start in range(0, len(tokens), stride):
                # Inputs start .. end - 1 predict the tokens start + 1 .. end.
                end = min(start + window, len(tokens) - 1)
                logprobs = self._window(tokens[start : end + 1])
                parts.append(logprobs[scored - start - 1 :])
                scored = end + 1
                if scored >= len(tokens):
                    break
        return Score(tokens[1:].tolist(), np.concatenate(parts))

    def _window(self, tokens: np.ndarray) -> np.ndarray:
        """Log-probabilities of tokens[1:] given what stands before each."""
        model = self.model
        x = model.hidden(check_ids(tokens[:-1], self.config))[0]
        logits = model.xp.empty((len(x), self.config.padded_vocab_size), x.dtype)
        model.logits(x, model.new_workspace(len(x)), logits)
        targets = model.xp.asarray(tokens[1:])
        logprobs = ops.target_logprobs(logits, self.config.vocab_size, targets)
        return logprobs if model.xp is np else logprobs.get()

    def __call__(self, ids: Any) -> Any:
        """Logits of every position: ids [B, T] -> float32 [B, T, V] on the model's device."""
        with self._alone():
            return self.model(ids)


def _with_options(params: SamplingParams | None, options: dict[str, Any]) -> SamplingParams:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    if unknown := set(options) - names:
        raise InputError(
            f"unknown sampling option {sorted(unknown)[0]!r}",
            where="SamplingParams",
            remedy=f"Options: {', '.join(sorted(names))}.",
        )
    return dataclasses.replace(params or SamplingParams(), **options)


def load(
    name_or_path: str = "shakespeare",
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    tokenizer: str | Tokenizer | None = None,
) -> LanguageModel:
    """Load a checkpoint as a :class:`LanguageModel`.

    Parameters
    ----------
    name_or_path : str
        "shakespeare" (embedded), an alias (gpt2, gpt2-medium, gpt2-large,
        gpt2-xl, distilgpt2), a hub id, a folder in Hugging Face layout, or an
        llm.c ``.bin`` file.
    dtype : {"auto", "float32", "float16", "bfloat16"}
        "auto" keeps the stored one on a GPU; the CPU always computes in float32.
    device : str
        "auto" (the GPU where one can be used), "cpu", "cuda" or "cuda:1".
    revision : str, optional
        Branch, tag or commit of a hub id.
    tokenizer : str or Tokenizer, optional
        Folder or llm.c tokenizer file; by default the checkpoint's own.

    Raises
    ------
    Gpt2CupyError
        One of its kinds, naming what is wrong, where, and the remedy.
    """
    model, source = loading.load_model(name_or_path, dtype=dtype, device=device, revision=revision)
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_path(source.path if tokenizer is None else tokenizer)
    return LanguageModel(model, tokenizer, source.name)
