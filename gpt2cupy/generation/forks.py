"""What a fork leaves in the child: locks of threads that are not there, and no CUDA."""

from __future__ import annotations

import os
import weakref
from typing import Protocol

from ..errors import DeviceError


class Forkable(Protocol):
    """What has to be put right in a child before anything uses it."""

    def after_fork(self) -> None:
        """Forget what threads of the parent were doing; called in the child."""


_known: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch(thing: Forkable) -> None:
    """Have ``thing.after_fork()`` called in every child of this process, while it exists."""
    _known.add(thing)


def _in_child() -> None:
    for thing in list(_known):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def no_gpu_here(where: str) -> DeviceError:
    """The error for a model of the parent's GPU."""
    return DeviceError(
        "this process was forked from one that uses the GPU, which CUDA cannot share with it",
        where=where,
        remedy='Start processes by the method "spawn", or fork before a model is loaded.',
    )
