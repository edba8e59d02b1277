"""Compiling in processes of their own: the same bytes and errors, and nothing is left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time

import pytest

from gpt2cupy.errors import CompileError
from gpt2cupy.ops.core import compiler, processes
from gpt2cupy.ops.core.processes import Compilers

pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")

SOURCE, OPTIONS = "propose_drafts.cu", ["-arch=sm_80", "-std=c++17"]


@pytest.fixture(scope="module")
def compilers():
    made = Compilers(1, compiler.compile_source)
    yield made
    made.close()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_process_compiles_the_same(compilers):
    assert compilers.compile_source(SOURCE, OPTIONS) == compiler.compile_source(SOURCE, OPTIONS)


def test_an_error_comes_whole(compilers):
    with pytest.raises(CompileError) as caught:
        compilers.compile_source(SOURCE, [*OPTIONS, "--no-such-option"])
    with pytest.raises(CompileError) as own:
        compiler.compile_source(SOURCE, [*OPTIONS, "--no-such-option"])
    assert str(caught.value) == str(own.value)
    assert caught.value.where == SOURCE and caught.value.remedy == own.value.remedy


def test_all_is_compiled_in_processes_meanwhile(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "_cuda_includes", lambda: pytest.fail("in this process"))
    monkeypatch.setattr(compiler, "threads", lambda: 1)
    with compiler.in_processes():
        path = compiler.request(SOURCE, {}, "sm_80").result(60)
    assert path.parent == tmp_path and path.read_bytes()[:4] == b"\x7fELF"
    assert compiler._compilers is None


def test_a_killed_process_is_an_error():
    compilers = Compilers(1, compiler.compile_source)
    compilers.compile_source(SOURCE, OPTIONS)
    (process,) = compilers._pool._processes
    os.kill(process, signal.SIGKILL)
    with pytest.raises(CompileError, match="killed") as caught:
        for _ in range(100):
            compilers.compile_source(SOURCE, OPTIONS)
    assert "memory" in caught.value.remedy and caught.value.where == SOURCE
    compilers.close()


def test_no_semaphores_are_an_error(monkeypatch):
    def refuse(*given):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(processes, "ProcessPoolExecutor", refuse)
    with pytest.raises(CompileError, match="not implemented") as caught:
        processes.Compilers(1, compiler.compile_source)
    assert caught.value.where and "/dev/shm" in caught.value.remedy


def test_processes_end_with_their_parent():
    """Also with one that is killed, which can tell them nothing."""
    theirs, ours = multiprocessing.Pipe()
    parent = multiprocessing.get_context("fork").Process(target=_wait, args=(ours,))
    parent.start()
    assert theirs.poll(60)
    process = theirs.recv()
    assert alive(process)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(process)


def _wait(pipe) -> None:
    from multiprocessing import forkserver

    forkserver._forkserver._forkserver_pid = None  # one of its own
    forkserver._forkserver._forkserver_alive_fd = None
    compilers = Compilers(1, compiler.compile_source)
    compilers.compile_source(SOURCE, OPTIONS)
    pipe.send(next(iter(compilers._pool._processes)))
    time.sleep(60)
