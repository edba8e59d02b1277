"""Beginnings of cache slots, copied to others. Kernel: cuda_src/copy_slots.cu."""

from __future__ import annotations

from typing import Any

from .core.cuda_source import constants
from .core.launch import Kernel, launch
from .core.registry import op

Array = Any

COPY_SLOTS = Kernel(
    "copy_slots.cu",
    "copy_slots",
    "k: ELEM[L,S,NH,T,HS], v: ELEM[L,S,NH,T,HS], sources: int32[R], targets: int32[R], "
    "counts: int32[R], S, NH, T, HS",
)


@op(
    reference="reference.copy_slots",
    takes="k: real[L,S,NH,T,HS], v: @k[L,S,NH,T,HS], sources: int32[R], targets: int32[R], "
    "counts: int32[R]",
    of_models=True,
)
def copy_slots(k: Array, v: Array, sources: Array, targets: Array, counts: Array) -> None:
    """Copy the keys and values of the first tokens of some cache slots to other slots.

    Parameters
    ----------
    k, v : array [L, S, NH, T, HS]
        The cache of all layers; its slots ``targets`` are written.
    sources, targets, counts : array of int32 [R]
        From slot, to slot, and how many tokens. No slot may be both, nor a target twice.
    """
    layers, _, heads, _, _ = k.shape
    threads = constants("copy_slots.cu")["THREADS"]
    grid = layers * heads, len(sources), 2
    launch(COPY_SLOTS, grid, (threads,), (k, v, sources, targets, counts), elem=k.dtype)
