"""The progress bar of a call over many texts."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..errors import InputError, shown


@contextlib.contextmanager
def bar(
    progress: Any, total: int | None, *, long: bool, unit: str = "text", initial: int = 0
) -> Iterator[Callable[[int], object]]:
    """A progress bar on stderr; gives what it is told the number of finished ones by.

    Parameters
    ----------
    progress : bool or None
        None shows it for a long list on a terminal.
    total : int or None
    long : bool
    unit : str
    initial : int
        Those that were finished before.
    """
    if progress is not None and not isinstance(progress, bool | np.bool_):
        raise InputError(
            f"progress={shown(progress)} is impossible",
            where="progress",
            remedy="It must be True, False or None.",
        )
    at_terminal = sys.stderr is not None and sys.stderr.isatty()
    if not (long and at_terminal if progress is None else progress):
        yield lambda count: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit=unit, initial=initial, dynamic_ncols=True) as shown_:
        yield shown_.update
