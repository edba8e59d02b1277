"""The errors of gpt2cupy: each says what is wrong, where, and what to do about it."""

from __future__ import annotations

import typing


def shown(value: object, most: int = 80) -> str:
    """A value as an error shows it: Python's spelling of it, in one line, cut where it is long."""
    try:
        text = repr(value[: most + 1] if isinstance(value, str | bytes | list) else value)
    except Exception:  # an integer of thousands of digits, or an object that has no spelling
        text = f"<{type(value).__name__}>"
    text = " ".join(text.split("\n"))
    return text if len(text) <= most else text[: most - 1] + "\u2026"


def kind_of(value: object) -> str:
    """The type of a value with its article, "None" for None."""
    if value is None:
        return "None"
    name = type(value).__name__
    # "ndarray" is read by its letters.
    return f"{'an' if name[0] in 'aeiouAEIOU' or name == 'ndarray' else 'a'} {name}"


def not_a_flag(name: str, value: object, where: str = "") -> InputError:
    """The error for an argument that must be True or False."""
    where = where or name
    return InputError(f"{name} is {shown(value)}", where=where, remedy="Use True or False.")


class Gpt2CupyError(Exception):
    """Base of every error that gpt2cupy raises on purpose.

    Parameters
    ----------
    what : str
        What is wrong, in one sentence without the full stop.
    where : str, optional
        The file, argument, tensor or device concerned.
    remedy : str, optional
        What the reader can do about it.

    Attributes
    ----------
    what, where, remedy : str
        The three parts, for programs; ``str(error)`` joins them for people.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        place = f" ({where})" if where else ""
        advice = f". {remedy}" if remedy else ""
        super().__init__(f"{what}{place}{advice}")


class ConfigError(Gpt2CupyError, ValueError):
    """A configuration that no GPT-2 can have, or that this package does not run."""


class CheckpointError(Gpt2CupyError):
    """A checkpoint that cannot be found, read or trusted."""


class TokenizerError(Gpt2CupyError):
    """Tokenizer files that are missing, broken or do not fit the model."""


class NoTokenizerError(TokenizerError):
    """There is no tokenizer, or one of another kind than GPT-2's: only token ids can be used."""


class InputError(Gpt2CupyError, ValueError):
    """An argument of a call: a prompt too long, an id out of range, a wrong shape or dtype."""


class DeviceError(Gpt2CupyError):
    """A GPU or a CUDA installation that cannot be used, or a failure while it ran."""


class NoDeviceError(DeviceError):
    """There is no GPU, or no CuPy to use it with."""


class CompileError(DeviceError):
    """A kernel that NVRTC refused, or an NVRTC that is missing or too old for the chip."""


class DeviceMemoryError(DeviceError, MemoryError):
    """The GPU, or this machine, has too little free memory for what was asked."""


class NonFiniteError(Gpt2CupyError, ArithmeticError):
    """Logits of which one is NaN or positive infinity, or none is finite.

    The other prompts of a list, and the other continuations of a prompt, are
    finished before it is raised.

    Attributes
    ----------
    completions : Completion, list or None
        What the call would have returned, with None in place of each continuation
        that has no finite logits.
    failed : tuple of (int, int)
        Which those are: number of the prompt, number of its continuation.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str = "",
        remedy: str = "",
        completions: typing.Any = None,
        failed: tuple[tuple[int, int], ...] = (),
    ) -> None:
        super().__init__(what, where=where, remedy=remedy)
        self.completions = completions
        self.failed = failed


class ClosedError(Gpt2CupyError, RuntimeError):
    """A model that was closed."""


class BusyError(Gpt2CupyError, RuntimeError):
    """A model with a stream open in the same thread, or an engine that is running already."""
