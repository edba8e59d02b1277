"""Opening files that others made: plain files only, and without ever waiting."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading in binary.

    Raises
    ------
    OSError
        As ``open`` does, and for a named pipe, a device or a folder of that
        name. Opening a pipe the usual way waits until somebody writes to it.
    """
    with open(path, "rb", opener=_without_waiting) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "It is not a plain file", str(path))
        yield file


def read_plain(path: Path, most: int) -> bytes:
    """The bytes of a file.

    Raises
    ------
    OSError
        As :func:`open_plain`.
    ValueError
        If it has more than ``most`` bytes; it is not read then.
    """
    with open_plain(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"it is larger than {most >> 20} MiB")
        return file.read(size)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)
