"""GPT2: the forward pass as it reads on paper, over ops. It knows no sampling and no text."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import loading, ops
from .cache import KVCache
from .config import GPT2Config
from .errors import InputError, not_a_flag, shown
from .ids import check_ids
from .ops.quantized import scratch_size
from .shifts import NormShifts, Pair
from .weights import Weights
from .workspace import PackedPrompts, Workspace

Array = Any

_UNSTACKED = ("wte", "wpe", "lnf_w", "lnf_b", "lm_head")


def check_batch_invariant(value: bool) -> None:
    """Raise InputError unless it is True or False; before anything is downloaded."""
    if not isinstance(value, bool):
        raise not_a_flag("batch_invariant", value)


class GPT2:
    """The forward pass of a GPT-2 on the arrays of its weights (NumPy or CuPy).

    Parameters
    ----------
    config : GPT2Config
    weights : Weights
    gemv : {"ours", "cublas"}
        Backend of GEMV and of GEMM with few rows on the GPU (on sm_90 up to 64, with some weights
        256); more rows go to cuBLAS either way. The persistent step has GEMVs of its own: an
        engine that took it refuses to run after a change to "cublas".
    batch_invariant : bool
        Whether the bits of a sequence must depend neither on those beside it, nor on the
        pieces in which its prompt is run: one kernel and one order of sums for any
        number of rows. Slower.

    Attributes
    ----------
    decode_path : {"auto", "eager", "graph", "persistent"}
        How engines made later run a step of this model; "auto" is the fastest.
    shifts : NormShifts
        Products of norm biases and weights, computed once for steps of one row.
    """

    def __init__(
        self,
        config: GPT2Config,
        weights: Weights,
        *,
        gemv: str = "ours",
        batch_invariant: bool = False,
    ) -> None:
        self.config = config
        self.weights = weights
        self._batch_invariant = batch_invariant
        self.decode_path = "auto"
        on_device: Any = contextlib.nullcontext()
        if isinstance(weights.wpe, np.ndarray):
            self.xp: Any = np
        else:
            import cupy

            self.xp = cupy
            on_device = weights.wpe.device
        stacked = [name for name, array in weights.items() if name not in _UNSTACKED]
        # Indexing a device array costs microseconds: take the layers' views once.
        self.layers = [
            {name: getattr(weights, name)[layer] for name in stacked}
            for layer in range(config.n_layer)
        ]
        with on_device:  # which kernels there are is asked of the current one
            self.gemv = gemv

    def __repr__(self) -> str:
        config, count = self.config, sum(math.prod(a.shape) for _, a in self.weights.items())
        where = "cpu" if self.xp is np else f"cuda:{self.weights.wpe.device.id}"
        return (
            f"<GPT2 {count / 1e6:.1f}M parameters, {config.n_layer} layers of {config.n_embd} "
            f"channels and {config.n_head} heads, context {config.n_positions}, "
            f"{self.dtype} on {where}>"
        )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str = "shakespeare",
        *,
        dtype: str = "auto",
        device: str = "auto",
        revision: str | None = None,
        variant: str | None = None,
        adapter: str | None = None,
        batch_invariant: bool = False,
        quantize: str | None = None,
    ) -> GPT2:
        """Load a checkpoint as a forward pass alone, without tokenizer and engine.

        Parameters are those of :func:`gpt2cupy.load`.
        """
        check_batch_invariant(batch_invariant)
        weights, source = loading.load_weights(
            name_or_path, dtype=dtype, device=device, revision=revision, variant=variant,
            adapter=adapter, quantize=quantize,
        )  # fmt: skip
        return cls(source.config, weights, batch_invariant=batch_invariant)

    @classmethod
    def random(
        cls,
        config: GPT2Config,
        seed: int = 0,
        *,
        dtype: str = "float32",
        device: str = "auto",
        quantize: str | None = None,
    ) -> GPT2:
        """A model with random weights in GPT-2's initialisation; the same for every device."""
        options: Any = {"dtype": dtype, "device": device, "quantize": quantize}
        return cls(config, loading.random_weights(config, seed, **options))

    @property
    def dtype(self) -> np.dtype:
        return self.weights.dtype

    @property
    def batch_invariant(self) -> bool:
        """Fixed for the life of a model: engines rely on it."""
        return self._batch_invariant

    @property
    def gemv(self) -> str:
        return self._gemv

    @gemv.setter
    def gemv(self, name: str) -> None:
        if name not in ("ours", "cublas"):
            raise InputError(
                f"unknown GEMV backend {shown(name)}",
                where="gemv",
                remedy="Use 'ours' or 'cublas'.",
            )
        if self._batch_invariant and name == "cublas":
            raise InputError(
                "cuBLAS keeps no order of sums that is the same for any number of rows",
                where="batch_invariant",
                remedy="Use gemv='ours' with batch_invariant=True.",
            )
        self._gemv = name
        self.shifts = NormShifts(self.layers, self.backend)

    def force_gemv(self, name: str) -> None:
        """Set ``gemv`` as a user asked for it.

        Raises
        ------
        InputError
            Where it would change nothing: on the CPU. Also for what ``gemv`` cannot be.
        """
        if self.xp is np:
            raise InputError(
                f"gemv={name} is for a GPU, and this runs on the CPU",
                where="gemv",
                remedy="Leave it out.",
            )
        self.gemv = name

    @property
    def backend(self) -> str:
        """The backend of GEMV and GEMM, as :func:`gpt2cupy.ops.linear` takes it."""
        return "invariant" if self._batch_invariant else self.gemv

    def new_cache(self, slots: int = 1, capacity: int | None = None) -> KVCache:
        """A KV cache of this model's shape and dtype on its device."""
        return KVCache(self.config, slots, capacity, self.dtype, self.xp)

    def new_workspace(self, rows: int) -> Workspace:
        scratch = scratch_size(rows, self.layers[0].values(), self.dtype, self.backend)
        return Workspace(self.config, rows, self.dtype, self.xp, scratch=scratch)

    def forward(
        self,
        ids: Array,
        positions: Array,
        attend: Callable[[int, Array, Array], None],
        work: Workspace,
        shifts: Sequence[Pair] | None = None,
        last: Callable[[], Workspace] | None = None,
    ) -> Array:
        """Run every layer over the rows of ``work``; returns the residual stream [N, C].

        Parameters
        ----------
        ids, positions : array of int32 [N]
        attend : callable(layer, qkv, out)
            Attention of one layer over its cache.
        work : Workspace
            Of exactly N rows.
        shifts : sequence of pairs of arrays, optional
            :attr:`NormShifts.pairs`.
        last : callable, optional
            Called after the last layer's attention for the workspace of those rows that
            are needed behind it; they are returned.
        """
        eps = self.config.layer_norm_epsilon
        how: Any = {"backend": self.backend, "scratch": work.scratch}
        act: Any = how | {"activation": self.config.activation}
        x = ops.embedding(ids, positions, self.weights.wte, self.weights.wpe, out=work.x)
        for index, w in enumerate(self.layers):
            qkv_shift, fc_shift = shifts[index] if shifts else (None, None)
            norm = (x, w["ln1_w"], w["ln1_b"], eps)
            qkv: Any = how | {"h": work.h, "out": work.qkv, "shift": qkv_shift}
            ops.norm_linear(*norm, w["qkv_w"], w["qkv_b"], **qkv)
            attend(index, work.qkv, work.attended)
            if last is not None and index == self.config.n_layer - 1:
                work = last()  # ``how`` keeps the larger scratch
                x = work.x
            ops.linear(work.attended, w["proj_w"], w["proj_b"], residual=x, out=x, **how)
            norm = (x, w["ln2_w"], w["ln2_b"], eps)
            fc: Any = act | {"h": work.h, "out": work.inner, "shift": fc_shift}
            ops.norm_linear(*norm, w["fc_w"], w["fc_b"], **fc)
            ops.linear(work.inner, w["out_w"], w["out_b"], residual=x, out=x, **how)
        return x

    def logits(self, x: Array, work: Workspace, out: Array) -> Array:
        """Logits [N, Vp] (float32) of rows of the residual stream."""
        w = self.weights
        norm = (x, w.lnf_w, w.lnf_b, self.config.layer_norm_epsilon)
        return ops.norm_linear(
            *norm, w.lm_head, h=work.h, out=out, backend=self.backend, scratch=work.scratch
        )

    def prefill(
        self, tokens: Sequence[np.ndarray], slots: Sequence[int], cache: KVCache, work: Workspace
    ) -> tuple[Array, np.ndarray]:
        """Run new tokens of several sequences, packed without padding, extending their slots.

        Parameters
        ----------
        tokens : sequence of array of int [T_r]
            New tokens of each sequence; together at most ``work.rows``.
        slots : sequence of int
            Cache slot of each; the tokens follow what it holds.
        cache : KVCache
        work : Workspace

        Returns
        -------
        x : array [N, C]
            Residual stream of all tokens, in work's memory.
        starts : numpy.ndarray of int32 [R + 1]
            Sequence r owns the rows from ``starts[r]`` to ``starts[r + 1] - 1``.
        """
        packed = PackedPrompts(sum(len(t) for t in tokens), len(tokens), self.xp)
        starts = packed.fill(tokens, slots, cache)
        x = self.run_packed(packed, max(len(t) for t in tokens), cache, work.first(packed.rows))
        return x, starts

    def run_packed(
        self,
        packed: PackedPrompts,
        longest: int,
        cache: KVCache,
        work: Workspace,
        states: Array | None = None,
        last: Workspace | None = None,
    ) -> Array:
        """Queue the layers for what ``packed`` holds; returns the residual stream [N, C].

        Parameters
        ----------
        packed : PackedPrompts
        longest : int
            At least the new tokens of any of its sequences.
        cache : KVCache
        work : Workspace
            Of exactly ``packed.rows`` rows.
        states : array [L, N, C], optional
            Where the residual stream goes as each layer reads it.
        last : Workspace, optional
            Of a row per sequence. Then only the row of each one's last token goes on after
            the last layer's attention, here, and the result is [R, C].
        """

        def attend(layer: int, qkv: Array, out: Array) -> None:
            if states is not None:
                states[layer] = work.x
            k, v = cache.layers[layer]
            scale = self.config.attention_scale(layer)
            rows = packed.starts, packed.slots, packed.past, longest
            ops.attention_prefill(
                qkv, k, v, *rows, scale, out=out, batch_invariant=self._batch_invariant
            )

        def last_rows() -> Workspace:
            assert last is not None
            ops.last_rows(work.x, work.attended, packed.starts, out=(last.x, last.attended))
            return last

        rest = None if last is None else last_rows
        return self.forward(packed.ids, packed.positions, attend, work, last=rest)

    def decode(
        self,
        ids: Array,
        positions: Array,
        slots: Array,
        cache: KVCache,
        work: Workspace,
        logits: Array,
        *,
        together: bool = False,
    ) -> Array:
        """One token per row: ids [B] at positions [B] into slots [B] -> logits [B, Vp].

        Rows of one slot are allowed with ``together``, at neighbouring positions in their order:
        each sees the keys of those before it.
        """

        def attend(layer: int, qkv: Array, out: Array) -> None:
            k, v = cache.layers[layer]
            if together:
                ops.store_kv(qkv, k, v, slots, positions)
            scale = self.config.attention_scale(layer)
            ops.attention_decode(
                qkv, k, v, slots, positions, scale, out=out, batch_invariant=self._batch_invariant
            )

        pairs = self.shifts.of_step(self.xp) if len(ids) == 1 else None
        x = self.forward(ids, positions, attend, work, pairs)
        return self.logits(x, work, logits)

    def prepare_step(self, rows: int) -> None:
        """Compute what speeds up :meth:`decode` with so many rows; not while it is recorded."""
        if rows == 1:
            self.shifts.record(self.xp)
            self.shifts.make(self.xp)

    def hidden(self, ids: Array) -> Array:
        """Residual stream after the last layer, before the last norm: ids [B, T] -> [B, T, C]."""
        host = check_ids(ids, self.config)
        batch, length = host.shape
        work = self.new_workspace(batch * length)
        x, _ = self.prefill(list(host), range(batch), self.new_cache(batch, length), work)
        return x.reshape(batch, length, -1)

    def hidden_states(self, ids: Array) -> Array:
        """Hidden states of every layer: ids [B, T] -> float32 [L + 1, B, T, C].

        What transformers gives for ``output_hidden_states``: first the embeddings,
        then the residual stream after each layer. The last one has the last norm
        applied too, and the precision of the weights' dtype.

        Raises
        ------
        InputError
            If an id is outside the vocabulary or T exceeds ``n_positions``.
        """
        host, w = check_ids(ids, self.config), self.weights
        batch, length = host.shape
        cache, work = self.new_cache(batch, length), self.new_workspace(batch * length)
        packed = PackedPrompts(work.rows, batch, self.xp)
        packed.fill(list(host), range(batch), cache)
        states = self.xp.empty((self.config.n_layer + 1, *work.x.shape), work.x.dtype)
        x = self.run_packed(packed, length, cache, work, states)
        states[-1] = ops.layer_norm(x, w.lnf_w, w.lnf_b, self.config.layer_norm_epsilon, out=work.h)
        return states.reshape(-1, batch, length, self.config.n_embd)

    def __call__(self, ids: Array) -> Array:
        """Logits of every position, without a cache kept: ids [B, T] -> float32 [B, T, V].

        Raises
        ------
        InputError
            If an id is outside the vocabulary or T exceeds ``n_positions``.
        """
        x = self.hidden(ids)
        batch, length, channels = x.shape
        out = self.xp.empty((batch * length, self.config.padded_vocab_size), x.dtype)
        flat = x.reshape(-1, channels)
        self.logits(flat, self.new_workspace(len(flat)), out)
        return out.reshape(batch, length, -1)[:, :, : self.config.vocab_size]
