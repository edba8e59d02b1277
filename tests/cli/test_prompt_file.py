"""``gpt2cupy generate --prompts``."""

from __future__ import annotations

import contextlib
import io
import json
import re
from unittest.mock import Mock

import pytest
from command import CPU, SHORT, call, done

import gpt2cupy
from gpt2cupy.cli import prompt_file
from gpt2cupy.cli.app import app

PROMPTS = ["ROMEO:", "To be", "JULIET: o"]


@pytest.fixture(scope="module")
def lm():
    with gpt2cupy.load("shakespeare", device="cpu") as model:
        yield model


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfROMEO:\n\nTo be\r\nJULIET: o")
    return path


def test_each_line_is_continued(lm, file):
    texts = [each.text for each in lm.generate(PROMPTS, max_new_tokens=5)]
    expected = "".join(f"{p}{t}\n" for p, t in zip(PROMPTS, texts, strict=True))
    code, out, err = call("generate", "--prompts", str(file), *SHORT)
    assert (code, out) == (0, expected)
    assert re.search(r"3 texts, 15 tokens in [^;]*; 1 empty line was left out\n", err)
    # Which lines they are of, and where each text ends.
    assert re.findall(r"\[line (\d): 5 tokens \(length\)]", err) == ["1", "3", "4"]
    assert "line" not in call("generate", "--prompts", str(file), *SHORT, "--quiet")[2]
    assert done("generate", "--prompts", str(file), *SHORT, "--max-batch", "1") == expected
    assert done("generate", "--prompts", "-", *SHORT, stdin=file.read_bytes()) == expected
    without = done("generate", "--prompts", str(file), "--no-echo", *SHORT)
    assert without == "".join(f"{text}\n" for text in texts)


def test_json_has_an_object_for_each_continuation(lm, file):
    flags = ("--n", "2", "--temperature", "0.9", "--seed", "1", "--json", "--logprobs", "1")
    rows = [json.loads(x) for x in
            done("generate", "--prompts", str(file), *SHORT, *flags).splitlines()]  # fmt: skip
    assert [(row["line"], row["prompt"], row["index"]) for row in rows] == [
        (number, prompt, index)
        for number, prompt in zip((1, 3, 4), PROMPTS, strict=True)
        for index in range(2)
    ]
    err = call("generate", "--prompts", str(file), *SHORT, *flags[:-3])[2]
    assert "[line 3, 2 of 2: 5 tokens (length)]" in err
    pair = lm.generate("To be", max_new_tokens=5, n=2, temperature=0.9, seed=1)
    assert [row["text"] for row in rows[2:4]] == [each.text for each in pair]
    assert [len(row["top"][0]) for row in rows] == [1] * 6


def test_a_prompt_that_does_not_fit_is_named_after_those_before(tmp_path):
    path = tmp_path / "prompts"
    path.write_text("ROMEO:\n\n" + "word " * 600 + "\nJULIET:\n")
    code, out, err = call("generate", "--prompts", str(path), *SHORT)
    assert code == 1 and out.count("ROMEO:") == 1 and "JULIET" not in out
    assert f"({path}, line 3, 'word" in err
    path.write_bytes(b"ROMEO:\n\xff\n")
    code, out, err = call("generate", "--prompts", str(path), *SHORT)
    assert code == 1 and out.startswith("ROMEO:") and "line 2" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompts", "x", "text"), "--prompts or one prompt"),
        (("--prompts", "x", "--file", "y"), "--prompts or one prompt"),
        (("--max-batch", "3", "text"), "--max-batch is for --prompts"),
        (("--speculate", "ngram", "-n", "2", "text"), "leave out --n"),
        (("--speculate", "ngram", "--prompts", "x"), "add --max-batch 1"),
    ],
)
def test_what_does_not_go_together(arguments, says):
    code, _, err = call("generate", *CPU, *arguments)
    assert code == 2 and says in err


def test_a_stdin_that_is_closed(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr("sys.stdin", None)
    with contextlib.redirect_stderr(out), pytest.raises(SystemExit) as ended:
        app(["generate", "--prompts", "-", *SHORT], prog_name="gpt2cupy")
    out.flush()
    assert ended.value.code == 1 and b"it is closed (stdin)" in out.buffer.getvalue()


def test_a_file_that_is_not_there(tmp_path):
    code, _, err = call("generate", "--prompts", str(tmp_path / "missing"), *CPU)
    assert code == 1 and "cannot be read" in err


def test_a_write_that_fails_closes_the_file(lm, file, monkeypatch):
    opened, lines = [], prompt_file.lines

    def noted(path):
        opened.append(lines(path))
        return opened[-1]

    monkeypatch.setattr(prompt_file, "lines", noted)
    monkeypatch.setattr(prompt_file.shell, "write", Mock(side_effect=BrokenPipeError))
    with pytest.raises(BrokenPipeError) as caught:  # its traceback keeps the frames
        prompt_file.run(
            lm, file, {"max_new_tokens": 1}, 1, special=False, echo=True, as_json=False, quiet=True
        )
    assert caught.tb and len(opened) == 1 and opened[0].gi_frame is None
