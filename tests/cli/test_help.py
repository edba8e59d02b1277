"""What ``-h`` shows on a terminal of 80 columns."""

from __future__ import annotations

import itertools

import pytest
import typer.main
from command import call, done

from gpt2cupy.cli.app import app

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_fits_eighty_columns(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = done(name, "--help")
    assert max(map(len, text.splitlines())) <= 80
    assert "\u2026" not in text and "[[" not in text
    assert not any(line.startswith("\u2502 --") and "list[" in line for line in text.splitlines())
    shown = [param for param in COMMANDS[name].params if not getattr(param, "hidden", False)]
    for option in (name for param in shown for name in (*param.opts, *param.secondary_opts)):
        assert not option.startswith("-") or f" {option} " in text
    # Paragraphs are wrapped once: no line ends where the next word has room.
    about = [line.strip() for line in text.partition("\u256d")[0].splitlines()]
    for line, after in itertools.pairwise(about):
        if line and after:
            assert len(line) + 1 + len(after.split()[0]) > 78, line


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("--port", "65536", "from 0 to 65535"),
        ("--workers", "0", "from 1 to 64"),
        ("--request-timeout", "nan", "0.001 or more"),
        ("--slots", "-1", "0 or more"),
    ],
)
def test_a_number_outside_its_range_is_wrong_usage(option, value, allowed):
    code, _, err = call("serve", option, value)
    assert code == 2 and f"'{option}'" in err
    assert f"is impossible. It must be {allowed}." in " ".join(err.replace("\u2502", "").split())
