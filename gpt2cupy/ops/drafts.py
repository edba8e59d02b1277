"""Rows of one text in a step, and its drafts. Kernels: store_kv.cu, *_drafts.cu.

Look-up speculation feeds the newest token of a text and drafts of those that may follow, in
neighbouring rows of one step.
"""

from __future__ import annotations

from typing import Any

from .core.cuda_source import constants
from .core.launch import Kernel, launch
from .core.registry import op

Array = Any

STORE_KV = Kernel(
    "store_kv.cu",
    "store_kv",
    "qkv: ELEM[B,C3], k: ELEM[S,NH,T,HS], v: ELEM[S,NH,T,HS], slots: int32[B], "
    "positions: int32[B], S, NH, T, HS",
    overlaps=True,
    writes_weights=True,  # keys and values, which attention loads before it waits
)
ACCEPT_DRAFTS = Kernel(
    "accept_drafts.cu",
    "accept_drafts",
    "ids: int32[M], positions: int32[M], sampled_positions: int32[M], chosen: uint8[R,1,16], "
    "history: int32[H], steps: uint32[M], ring: uint8[M,Q,16], R, M, H, Q",
    overlaps=True,
)
PROPOSE_DRAFTS = Kernel(
    "propose_drafts.cu",
    "propose_drafts",
    "ids: int32[R], positions: int32[R], history: int32[H], R, H",
)


@op(
    reference="reference.store_kv",
    takes="qkv: real[B,C3], k: real[S,NH,T,HS], v: real[S,NH,T,HS], slots: int32[B], "
    "positions: int32[B]",
    of_models=True,
)
def store_kv(qkv: Array, k: Array, v: Array, slots: Array, positions: Array) -> None:
    """Write the new keys and values of all rows to the cache, before attention reads it.

    Only needed where rows have the same slot: :func:`attention_decode` then finds the keys of
    the rows before its own in the cache.

    Parameters
    ----------
    qkv : array [B, 3C]
    k, v : array [S, NH, T, HS]
        One layer of the cache.
    slots, positions : array of int32 [B]
        As of :func:`attention_decode`.
    """
    launch(
        STORE_KV,
        (len(qkv), 2),
        (constants("store_kv.cu")["THREADS"],),
        (qkv, k, v, slots, positions),
        elem=qkv.dtype,
    )


@op(
    reference="reference.propose_drafts",
    takes="ids: int32[R], positions: int32[R], history: int32[H]",
    of_models=True,
)
def propose_drafts(ids: Array, positions: Array, history: Array) -> None:
    """Draft the tokens that may follow the newest one of a text.

    Parameters
    ----------
    ids : array of int32 [R]
        In: the newest token, first. Out: drafts behind it; -1 is none.
    positions : array of int32 [R]
        The first is the newest token's.
    history : array of int32 [H]
        The tokens of the text by position; the newest is added.

    Notes
    -----
    Drafts are what followed the last place where the text ended alike, by 2 to 8 tokens, the
    longest match first ("prompt lookup").
    """
    launch(
        PROPOSE_DRAFTS,
        (1,),
        (constants("propose_drafts.cu")["THREADS"],),
        (ids, positions, history),
    )


@op(
    reference="reference.accept_drafts",
    takes="ids: int32[M], positions: int32[M], sampled_positions: int32[M], "
    "chosen: uint8[R,1,16], history: int32[H], steps: uint32[M], ring: uint8[M,Q,16]",
    of_models=True,
)
def accept_drafts(
    ids: Array,
    positions: Array,
    sampled_positions: Array,
    chosen: Array,
    history: Array,
    steps: Array,
    ring: Array,
) -> None:
    """Keep the drafts that were sampled, and hand out the tokens.

    Of M rows of one text, the first R of which were fed in this step.

    Parameters
    ----------
    ids, positions : array of int32 [M]
        In: the newest token and the drafts that were fed after it, with their positions. Out:
        the newest token of the next step, and the positions of its rows.
    sampled_positions : array of int32 [M]
        Set to ``positions``, which sampling starts from.
    chosen : array of uint8 [R, 1, 16]
        ``RING_ENTRY`` of the token sampled in each row.
    history : array of int32 [H]
        The tokens of the text by position; the new ones are added.
    steps : array of uint32 [M]
        Tokens pushed so far in each row; advanced for the R rows.
    ring : array of uint8 [M, Q, 16]
        As of :func:`sample`; id -1 where a row's draft did not stand.
    """
    launch(
        ACCEPT_DRAFTS,
        (1,),
        (constants("accept_drafts.cu")["MOST_ROWS"],),
        (ids, positions, sampled_positions, chosen, history, steps, ring),
    )
