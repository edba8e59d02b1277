"""``gpt2cupy generate`` on a terminal without a prompt."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import time

import pytest
from command import CLI, CPU, PLAIN_ENV
from small_lm import small_lm

from gpt2cupy.cli import dialogue
from gpt2cupy.record import ROOT

SETTINGS = {"max_new_tokens": 4, "eos_token_id": -1}


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    with small_lm(tmp_path_factory.mktemp("small")) as lm:
        yield lm


@pytest.fixture
def talk(lm, monkeypatch, capsys):
    """A dialogue in which lines are typed: (dialogue, stdout, stderr)."""

    def run(*lines, settings=SETTINGS, special=False):
        typed = iter(lines)

        def answer(_prompt):
            line = next(typed, EOFError)
            if isinstance(line, type):
                raise line
            return line

        monkeypatch.setattr("builtins.input", answer)
        found = dialogue.Dialogue(lm, settings, special=special)
        found.run()
        return found, *capsys.readouterr()

    return run


def test_what_is_typed_goes_on_from_the_text_so_far(lm, talk):
    one = lm.generate("ROMEO", **SETTINGS).text
    two = lm.generate(f"ROMEO{one} and", **SETTINGS).text
    found, out, _ = talk("ROMEO", " and")
    assert found.text == f"ROMEO{one} and{two}"
    assert out == f"{one}\n{two}\n\n"
    # An empty line lets it go on, /new begins again, /undo takes a turn back.
    found, _, _ = talk("ROMEO", "")
    assert found.text == f"ROMEO{one}" + lm.generate(f"ROMEO{one}", **SETTINGS).text
    found, out, _ = talk("ROMEO", "x", "/undo", "/text", "/new", "/text")
    assert found.text == "" and out.endswith(f"\nROMEO{one}\n\n\n")
    found, _, _ = talk("", settings={"max_new_tokens": 1})
    assert found.text == lm.generate("", max_new_tokens=1).text


def test_settings_are_changed_between_turns(lm, talk):
    found, out, _ = talk(
        "/set max-new-tokens 2", "/set temperature 0.5", "/set seed 3", '/set stop ["x", "y"]',
        '/set logit_bias {"5": -1.5}', "/settings", "a",
    )  # fmt: skip
    wanted = {"max_new_tokens": 2, "temperature": 0.5, "seed": 3, "stop": ["x", "y"]}
    wanted |= {"logit_bias": {5: -1.5}, "eos_token_id": -1}
    assert found.settings == wanted
    assert found.text == "a" + lm.generate("a", **wanted).text
    assert re.search(r"^temperature +0\.5$", out, re.MULTILINE) and "logprobs" not in out


def test_what_is_wrong_ends_nothing(talk):
    lines = (
        "/nonsense", "/set", "/set zebra 1", "/set n 2", "/set temperature -1", "/undo",
        "/set max_new_tokens 1000", "a", "/set max_new_tokens 2", "//a", "/help",
    )  # fmt: skip
    found, out, err = talk(*lines)
    for says in ("no /nonsense", "'zebra 1' is no setting", "'n 2' is no setting",
                 "temperature=-1", "nothing to take back", "exceed the context"):  # fmt: skip
        assert says in err
    assert found.text.startswith("/a") and "/set NAME VALUE" in out


def test_a_text_beyond_the_context_loses_its_beginning(lm, talk):
    long = "ab" * 200
    found, _, err = talk(long)
    assert "[the first 243 of 400 tokens are beyond the context]" in err
    expected = lm.generate(lm.tokenizer.encode(long)[-157:], **SETTINGS).text
    assert found.text == long + expected


def test_ctrl_c_at_the_prompt_leaves_the_line_alone(talk):
    found, out, _ = talk(KeyboardInterrupt, "a", "/quit", "b")
    assert found.text.startswith("a") and "b" not in found.text[:1]
    assert out.startswith("\n")


def test_ctrl_c_ends_the_text_and_not_the_dialogue(lm, talk, monkeypatch):
    written = []

    def write(text):
        written.append(text)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("gpt2cupy.cli.shell.write", write)
    found, _, _ = talk(
        "a", "/set max_new_tokens 1", "b", settings=SETTINGS | {"max_new_tokens": 99}
    )
    assert found.text.startswith("a" + "".join(written[:3]) + "b")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_special_tokens_stand_for_themselves_where_asked(lm, talk):
    end = lm.tokenizer.eot_token
    found, _, _ = talk("<|endoftext|>", special=True)
    assert found.text == "<|endoftext|>" + lm.generate([end], **SETTINGS).text


class Terminal:
    """The command with a terminal for its stdin and stdout."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.shown = ""
        self.process = subprocess.Popen(
            [*CLI, *arguments], stdin=slave, stdout=slave, stderr=slave, cwd=ROOT,
            env=PLAIN_ENV | {"TERM": "dumb"}, start_new_session=True,
            preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)

    def until(self, pattern: str) -> str:
        """What is shown up to the pattern; it is taken away."""
        end = time.monotonic() + 60
        while not (match := re.search(pattern, self.shown)):
            assert time.monotonic() < end, self.shown
            if select.select([self.master], [], [], 1)[0]:
                self.shown += os.read(self.master, 65536).decode()
        before, self.shown = self.shown[: match.end()], self.shown[match.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())


def test_a_dialogue_on_a_real_terminal():
    terminal = Terminal("generate", *CPU, "--max-new-tokens", "400", "--eos-token-id", "-1")
    try:
        terminal.until(r"/help says what else\.\s+> ")
        terminal.type("ROMEO:\n")
        terminal.until(r"ROMEO:\r\n.*\w+ \w+")
        terminal.type("\x03")  # Ctrl-C, while it writes
        terminal.until(r"> ")
        terminal.type("/set max_new_tokens 3\n")
        terminal.until(r"> ")
        terminal.type("JULIET:\n")
        terminal.until(r"JULIET:[\s\S]*> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        terminal.process.wait()
        os.close(terminal.master)
