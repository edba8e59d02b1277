"""NVRTC in processes of its own, for a command that compiles hundreds of kernels.

The threads of a process parse one after another, for NVRTC's front end has a lock, and only
optimise side by side. So more than a few cores wait for the parser, unless each has a process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from ...errors import CompileError


class Compilers:
    """Processes that compile, until it is closed.

    Parameters
    ----------
    count : int
        Processes at most; each is started when there is work for it, and takes about 200 MB.
    compile_source : callable
        Takes a source and options and returns a cubin; a function of a module, which they import.

    Raises
    ------
    CompileError
        If the system has no semaphores for them.
    """

    def __init__(self, count: int, compile_source: Callable[[str, list[str]], bytes]) -> None:
        self._compile_source = compile_source
        # A server of forks imports CuPy once, and has neither this process's threads nor its GPU.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([compile_source.__module__, "cupy"])
        try:
            self._pool = ProcessPoolExecutor(count, context, _begin)
        except (OSError, NotImplementedError) as error:
            raise CompileError(
                f"processes that compile cannot be started: {error}",
                where="multiprocessing",
                remedy="They need semaphores: give the container a /dev/shm that can be written. "
                "What is not compiled ahead is compiled when it is first launched.",
            ) from error

    def compile_source(self, source: str, options: list[str]) -> bytes:
        """The cubin, made by another process, which is waited for.

        Raises
        ------
        CompileError
            What was raised there, or if the process was killed.
        """
        try:
            return self._pool.submit(self._compile_source, source, options).result()
        except BrokenProcessPool as error:
            raise CompileError(
                "a process that compiled kernels was killed",
                where=source,
                remedy="Probably memory ran out, of which each takes about 200 MB: use fewer "
                "cores (taskset -c 0-3 gpt2cupy compile). What was compiled is kept.",
            ) from error
        except OSError as error:
            raise CompileError(
                f"a process that compiles cannot be started: {error}",
                where=source,
                remedy="Use fewer cores (taskset -c 0-3 gpt2cupy compile), or free memory. What "
                "was compiled is kept.",
            ) from error

    def close(self) -> None:
        """End the processes; what has not begun is left."""
        self._pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """What a process does first: Ctrl-C is its parent's to handle, and it ends with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os._exit(1)
