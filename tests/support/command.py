"""Running the command: as a process, inside this one, or on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios

from gpt2cupy.cli.app import app
from gpt2cupy.record import ROOT

CLI = (sys.executable, "-m", "gpt2cupy")
CPU = ("--device", "cpu")
SHORT = (*CPU, "--max-new-tokens", "5")
# What colours depend on is this test's to say.
PLAIN_ENV = {
    key: value
    for key, value in os.environ.items()
    if key not in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS", "TERM")
}


def cli(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """The command as a process, with nothing on stdin unless ``input`` is given."""
    given = {"stdin": subprocess.DEVNULL} if "input" not in options else {}
    given |= {"capture_output": True, "text": True, "cwd": ROOT, "env": PLAIN_ENV}
    return subprocess.run([*CLI, *arguments], **(given | options))


class Terminal(io.BytesIO):
    """A stdin that nobody pipes into."""

    def isatty(self) -> bool:
        return True


def call(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command inside this process."""
    source = Terminal(b"typed") if stdin is None else io.BytesIO(stdin)
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    saved, sys.stdin = sys.stdin, io.TextIOWrapper(source)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                app(list(arguments), prog_name="gpt2cupy")
            except SystemExit as end:
                code = end.code
    finally:
        sys.stdin = saved
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return code, *texts


def done(*arguments: str, stdin: bytes | None = None) -> str:
    """Stdout of a command that succeeds."""
    code, out, err = call(*arguments, stdin=stdin)
    assert code == 0, err
    return out


def on_terminal(*arguments: str, env: dict[str, str]) -> tuple[int, str]:
    """Exit code, and what a terminal on stderr shows."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("4H", 25, 300, 0, 0))  # rows, columns
    try:
        ended = cli(
            *arguments, env=env, capture_output=False, stdout=subprocess.DEVNULL, stderr=slave
        )
        return ended.returncode, os.read(master, 65536).decode()
    finally:
        os.close(slave)
        os.close(master)
