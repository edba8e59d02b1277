"""What fronts and the engine process tell each other: msgpack over ZeroMQ, never pickle.

A frame is a list of messages. A front opens with :class:`Hello`; the engine answers with
:class:`Ready` when it can take requests. Streams are numbered by their front.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np

from ..sampling import SamplingParams


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """A front is there; one that was there under its number before is not any more."""

    front: int


class Submit(msgspec.Struct, tag="submit", array_like=True):
    """A request to continue.

    Attributes
    ----------
    stream : int
    prompt : bytes
        int32 ids.
    params : dict
        Fields of SamplingParams that are not its defaults.
    index : int
        Which of ``n`` continuations.
    eos : list of int
    arrived : float
        When the front had it, by ``time.monotonic``, which all processes of a machine share.
    """

    stream: int
    prompt: bytes
    params: dict[str, Any]
    index: int
    eos: list[int]
    arrived: float


class Score(msgspec.Struct, tag="score", array_like=True):
    """A text whose log-probabilities are wanted, with those of the ``top`` most probable tokens."""

    stream: int
    tokens: bytes
    top: int


class Cancel(msgspec.Struct, tag="cancel", array_like=True):
    """Streams that nobody waits for any more."""

    streams: list[int]


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The engine takes requests."""

    about: dict[str, Any]


class Tick(msgspec.Struct, tag="tick", array_like=True):
    """Tokens that arrived, in their order.

    Attributes
    ----------
    streams : bytes
        int64, the stream of each token.
    ids : bytes
        int32.
    logprobs : bytes
        float32.
    finished : list of (int, str)
        Streams whose last token is among these, and why it is.
    top : (int, bytes, bytes) or None
        How many most probable tokens stand with each, their int32 ids (-1 where a stream asks
        for fewer) and float32 log-probabilities.
    """

    streams: bytes
    ids: bytes
    logprobs: bytes
    finished: list[tuple[int, str]]
    top: tuple[int, bytes, bytes] | None = None


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """A stream that gets no more, with an HTTP status and words for its client."""

    stream: int
    status: int
    message: str


class Scored(msgspec.Struct, tag="scored", array_like=True):
    """What :class:`Score` asked for: float32 of all tokens but the first, and the most probable."""

    stream: int
    logprobs: bytes
    top: tuple[int, bytes, bytes]


ToEngine = list[Hello | Submit | Score | Cancel]
ToFront = list[Ready | Tick | Failed | Scored]

encode = msgspec.msgpack.Encoder().encode
decode_to_engine = msgspec.msgpack.Decoder(ToEngine).decode
decode_to_front = msgspec.msgpack.Decoder(ToFront).decode


def ints(data: bytes, kind: Literal["i", "q"] = "i") -> list[int]:
    """Packed int32 (``kind`` "q": int64) as a list."""
    return memoryview(data).cast(kind).tolist()


def floats(data: bytes) -> list[float]:
    """Packed float32 as a list."""
    return list(memoryview(data).cast("f"))


def packed(ids: Any) -> bytes:
    """Token ids as int32 bytes."""
    return np.asarray(ids, np.int32).tobytes()


def params_of(params: SamplingParams) -> dict[str, Any]:
    """The fields of SamplingParams that are not its defaults, as :class:`Submit` carries them."""
    given = {name: v for name, v in vars(params).items() if v != getattr(_DEFAULT, name)}
    if bias := given.get("logit_bias"):
        given["logit_bias"] = {id_: _in_64_bits(value) for id_, value in bias.items()}
    return {name: _in_64_bits(value) for name, value in given.items()}


def _in_64_bits(value: Any) -> Any:
    """An integer that msgpack has not, where a number was meant, as a float."""
    return float(value) if isinstance(value, int) and not -(2**63) <= value < 2**64 else value


_DEFAULT = SamplingParams()
