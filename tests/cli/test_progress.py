"""The line that says that kernels are being compiled: on a terminal, and there alone."""

from __future__ import annotations

import io
import time
from types import SimpleNamespace

import pytest
from command import CPU, cli

from gpt2cupy.cli import progress
from gpt2cupy.ops.core import compiler


class Terminal(io.StringIO):
    """A stderr that is one."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """The stderr of progress.py alone: pytest has its own plans with sys.stderr."""
    shown = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=shown))
    return shown


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def events(line, clock, *counts):
    for ended, asked in counts:
        line(ended, asked)
        clock[0] += 1


def test_one_line_grows_and_its_last_state_stays(terminal, clock):
    events(progress._Line(), clock, (0, 1), (0, 2), (1, 2), (2, 2))
    first, *more, last = terminal.getvalue().split("\r\033[K")[1:]
    assert first == "compiling 1 kernel (once) ... 0 done, 0.0 s"
    assert more[-1] == "compiling 2 kernels (once) ... 1 done, 2.0 s"
    assert last == "compiled 2 kernels in 3.0 s; the next start finds them\n"


def test_what_is_quick_leaves_no_line(terminal, clock):
    line = progress._Line()
    line(0, 1)
    line(1, 1)
    assert terminal.getvalue().endswith("\r\033[K")


def test_each_time_counts_from_its_own_start(terminal, clock):
    line = progress._Line()
    events(line, clock, (0, 1), (1, 1))
    clock[0] += 50
    events(line, clock, (0, 1), (1, 1))
    assert terminal.getvalue().count("compiled 1 kernel in 1.0 s") == 2


def test_an_error_finds_an_empty_line(terminal):
    with pytest.raises(KeyError), progress.compiling():
        compiler._jobs._tell()
        for watcher in compiler._jobs._watchers:
            watcher(0, 3)
        raise KeyError
    assert terminal.getvalue().endswith("\r\033[K") and not compiler._jobs._watchers


@pytest.mark.parametrize("quiet", [False, True])
def test_without_a_terminal_or_when_quiet_nothing_watches(quiet, monkeypatch):
    stderr = Terminal() if quiet else io.StringIO()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stderr))
    with progress.compiling(quiet=quiet):
        assert not compiler._jobs._watchers


def test_compiled_kernels_are_shown(terminal, tmp_path, monkeypatch):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiler, "compile_source", lambda *given: time.sleep(0.6) or b"cubin")
    with progress.compiling():
        compiler.cubin("norm.cu", {"ELEM": "__half"}, "sm_90")
    assert "compiling 1 kernel (once)" in terminal.getvalue()


def test_the_prompt_stands_before_the_text_and_alone_where_there_is_none():
    wanted = ("--max-new-tokens", "2", "--quiet")
    assert cli("generate", "ROMEO:", *CPU, *wanted).stdout.startswith("ROMEO:")
    assert cli("generate", "ROMEO:", *CPU, "--max-new-tokens", "0").stdout == "ROMEO:\n"
