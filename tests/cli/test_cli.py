"""The command line: how it begins and ends, and what it shows where."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import warnings

import pytest
from command import CLI, CPU, PLAIN_ENV, SHORT, call, cli, on_terminal

import gpt2cupy
from gpt2cupy.errors import CompileError
from gpt2cupy.generation.text import Piece
from gpt2cupy.lm import LanguageModel
from gpt2cupy.record import ROOT

# -- entry ---------------------------------------------------------------------------------------


def test_version():
    shown = cli("--version")
    assert (shown.returncode, shown.stdout) == (0, f"gpt2cupy {gpt2cupy.__version__}\n")


def test_the_installed_command_is_there():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'gpt2cupy = "gpt2cupy.cli:main"' in text
    code = "import sys; sys.argv = ['gpt2cupy', '--version']; from gpt2cupy.cli import main; main()"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (shown.returncode, shown.stdout) == (0, f"gpt2cupy {gpt2cupy.__version__}\n")


# -- how a command ends --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, says",
    [
        (("generate", "a", "--model", "/no/such/folder"), "/no/such/folder"),
        (("generate", "--file", "two\nlines"), "two lines"),
        (("generate", "a", "--temperature", "-1"), "temperature"),
        (("generate", "a", "--max-new-tokens", "100000"), "context"),
        (("generate", "a", "--n", "0"), "--n 0"),
        (("generate", "a", "--dtype", "int4"), "int4"),
        (("generate", "a", "--device", "tpu"), "tpu"),
        (("generate", "--file", "/no/such/file"), "/no/such/file"),
        (("generate", "--file", "/"), "directory"),
        (("score", "a", "--window", "0"), "window"),
        (("tokenize", "a", "--model", "/no/such/folder"), "/no/such/folder"),
        (("info", "--model", "/no/such/folder"), "/no/such/folder"),
    ],
)
def test_an_error_is_one_line_on_stderr(arguments, says):
    device = () if {"--device", "tokenize"} & set(arguments) else CPU
    quiet = () if arguments[0] in ("info", "tokenize") else ("--quiet",)
    failed = cli(*arguments, *device, *quiet)
    code = 2 if says in ("temperature", "--n 0", "int4", "tpu", "window") else 1
    assert (failed.returncode, failed.stdout) == (code, "")
    assert says in failed.stderr and failed.stderr.startswith("gpt2cupy: ")
    assert failed.stderr.count("\n") == 1


def test_text_that_is_not_utf8_names_the_byte(tmp_path):
    (tmp_path / "text").write_bytes(b"abc\xff")
    for arguments, stdin in (
        (("--file", str(tmp_path / "text")), None),
        (("-",), b"abc\xff"),
    ):
        code, out, err = call("tokenize", *arguments, stdin=stdin)
        assert code == 1 and out == "" and "byte 3 is not UTF-8" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "--no-such-option"),
        ("no-such-command",),
        ("generate", "a", "--top-k", "many"),
        ("generate", "a", "--gemv", "theirs"),
        ("generate", "a", "--gemv", "ours", "--batch-invariant"),
        ("validate", "shakespeare", "--model", "gpt2"),
        ("compile", "--arch", "../../x"),
        ("compile", "--arch", "sm_12345"),
        ("compile", "--arch", "sm_70"),
        ("generate", "a", "--file", "README.md"),
        ("generate", "a", "--logprobs", "3"),
        ("generate", "a", "--logit-bias", "5=1", "--logit-bias", "5=2"),
        ("tokenize", "a", "b"),
        ("tokenize", "--decode", "--special", "1"),
        ("info", "--arch", "sm_90"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments):
    code, out, err = call(*arguments)
    assert code == 2 and out == "" and "Usage" in err


def test_wrong_usage_as_a_process():
    failed = cli("generate", "--no-such-option")
    assert (failed.returncode, failed.stdout) == (2, "") and "Traceback" not in failed.stderr


def test_a_compilers_log_goes_to_a_file(monkeypatch, tmp_path):
    def refuse(*given, **options):
        raise CompileError("NVRTC refused the source:\nx.cu(1): error", where="x.cu", remedy="Do.")

    monkeypatch.setattr("gpt2cupy.lm.load", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, _, err = call("generate", "a", *CPU)
    assert code == 1 and err.count("\n") == 1
    (log,) = tmp_path.iterdir()
    assert err == f"gpt2cupy: NVRTC refused the source (x.cu). Do. The log: {log}\n"
    assert "x.cu(1): error" in log.read_text()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    assert "x.cu(1): error" in call("generate", "a", *CPU)[2], "shown where it cannot be kept"


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "ROMEO:", *SHORT, "--quiet"),
        ("generate", "ROMEO:", *SHORT, "--quiet", "--json"),
        ("tokenize", "a"),
        ("info", *CPU),
        ("profile", "--runs", "1", "--tokens", "2", "--warmup", "0", *CPU),
        ("validate", "--steps", "2", "--dtype", "float32", *CPU),
        ("--version",),
    ],
)
def test_a_reader_that_went_away(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = cli(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_help_to_a_reader_that_went_away_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        ended = cli("--help", capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    finally:
        os.close(writer)
    assert ended.returncode != 0 and ended.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk():
    with open("/dev/full", "w") as full:
        ended = cli("tokenize", "a", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "No space left" in ended.stderr


# Runs a command that hears Ctrl-C: what a script runs in the background ignores it, and so would
# the command.
HEARING = """import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])"""


def test_ctrl_c_while_reading():
    command = [sys.executable, "-c", HEARING, *CLI, "tokenize", "-"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, cwd=ROOT, **pipes) as child:
        assert child.stdin is not None and child.stdout is not None and child.stderr is not None
        # More than a pipe holds: when this returns, the command is reading.
        child.stdin.write(b"a" * (1 << 20))
        child.stdin.flush()
        for _ in range(10):
            # A signal that arrives between two reads is seen only after the second.
            child.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(5)
                break
        assert child.returncode == 130
        assert child.stderr.read() == b"" == child.stdout.read()
        with contextlib.suppress(BrokenPipeError):
            child.stdin.close()


def test_ctrl_c_in_the_middle_of_a_text(monkeypatch):
    def stream(self, prompt, **settings):
        yield Piece(" I", 0, 0.0, None, 0.0, 0.0, [])
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "stream", stream)
    code, out, err = call("generate", "ROMEO:", *SHORT, "--quiet")
    assert (code, out, err) == (130, "ROMEO: I", "")


def test_ctrl_c_before_the_command_begins():
    code = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from gpt2cupy.cli import main; main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (130, b"")


# -- colour and warnings -------------------------------------------------------------------------


def test_colour_only_on_a_terminal():
    arguments = ("tokenize", "--decode", "x")
    assert "\033" not in cli(*arguments).stderr
    code, shown = on_terminal(*arguments, env=PLAIN_ENV | {"TERM": "xterm"})
    assert code == 1 and "\033[31mgpt2cupy:\033[0m 'x'" in shown
    for plain in ({"TERM": "xterm", "NO_COLOR": "1"}, {"TERM": "dumb"}):
        code, shown = on_terminal(*arguments, env=PLAIN_ENV | plain)
        assert code == 1 and "gpt2cupy: 'x'" in shown and "\033" not in shown


def test_usage_errors_have_no_colour_in_a_pipe():
    assert "\033" not in cli("generate", "--no-such-option").stderr


def test_warnings_are_lines_of_ours(monkeypatch):
    load = gpt2cupy.lm.load

    def warn(*given, **options):
        warnings.warn("kernels cannot be kept", RuntimeWarning, stacklevel=2)
        return load(*given, **options)

    monkeypatch.setattr("gpt2cupy.lm.load", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, _, err = call("generate", "a", *SHORT)
        assert "gpt2cupy: warning: kernels cannot be kept\n" in err and "RuntimeWarning" not in err
        assert call("generate", "a", *SHORT, "--quiet")[2] == ""
