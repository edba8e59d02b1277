"""tools/hooks/pre-commit lints what is staged, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from gpt2cupy.record import ROOT

HOOK = ROOT / "tools" / "hooks" / "pre-commit"
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def commit(tmp_path):
    """Commit files of a new repository with the hook on; returns what became of it.

    Its linters write down what they are called with, and fail where a file says BAD.
    """
    settings = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    for who in ("AUTHOR", "COMMITTER"):
        settings |= {f"GIT_{who}_NAME": "a", f"GIT_{who}_EMAIL": "a@example.com"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")} | settings
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("ruff", "mypy", "clang-format"):
        stub = '#!/bin/sh\necho "$(basename "$0") $*" >> called\n! grep -qs BAD -- "$@"\n'
        (tools / name).write_text(stub)
        (tools / name).chmod(0o755)

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    git("init", "-q")
    git("config", "core.hooksPath", str(HOOK.parent))

    def run(**files):
        for name, text in files.items():
            path = tmp_path / name.replace("__", ".")
            path.write_text(text)
            git("add", path.name)
        done = git("commit", "-qm", "a change")
        called = tmp_path / "called"
        lines = called.read_text().splitlines() if called.exists() else []
        called.unlink(missing_ok=True)
        return done.returncode, lines

    return run


def test_only_what_is_staged_is_linted(commit, tmp_path):
    (tmp_path / "other.py").write_text("BAD")
    assert commit(one__py="x = 1\n", notes__md="BAD") == (
        0,
        ["ruff check one.py", "ruff format --check one.py"],
    )
    assert commit(kernel__cu="//\n") == (0, ["clang-format --dry-run -Werror kernel.cu"])
    assert commit(more__md="") == (0, [])


def test_a_lint_error_stops_the_commit(commit):
    failed, called = commit(two__py="BAD")
    assert failed and called == ["ruff check two.py"]


def test_without_the_linters_it_says_how_to_get_them(commit, tmp_path):
    shutil.rmtree(tmp_path / ".venv")
    assert commit(one__py="") == (1, [])
