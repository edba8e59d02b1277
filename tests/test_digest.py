"""Digests by meaning: what changes one, what does not, and that every Python agrees."""

from __future__ import annotations

import ast
import subprocess
import sys

import pytest

from gpt2cupy.digest import digest_cuda, digest_python
from gpt2cupy.record import ROOT

PYTHON = '''"""A module."""
# A comment.
import os

SIZE = 3  # of a tile
TEXT = "# no comment" + 'it\\'s' + f"{SIZE!r:>{SIZE}} # {'x'}"


class A:
    """A class
    of two lines."""

    x = r"\\"

    def f(self, a, *, b=2):
        r"""What it
        does."""
        if a:
            return [
                a,  # the first
                b,
            ]
        """not a docstring"""
        return None


async def g() -> str:
    "In" \\
        " parts."
    return b"""bytes # kept
  as they are"""
'''
CUDA = r"""// What it does.
#include "common.cuh"
#define TWICE(x) \
  ((x) + (x))
/* A block
   comment. */
constexpr int BIG = 1'000'000;  // it's large
extern "C" __global__ void f(float* out, const char* text) {
  const char* a = "// no comment \" /* nor this */";
  const char* b = R"x(a
  // kept )" )x";
  char c = '"';  // " opens nothing
#if BIG > 10  // a condition
  out[0] = a[1] - -b[2] /* + c */;
#endif
}
"""
# Fixed: another Python, or another version of the scanner, must not give another digest in silence.
VECTORS = {
    (digest_python, ""): "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    (digest_python, PYTHON): "c04f8ffffe6deaf5f86bde28a6f461410b9d70932494abbda5e9b8befc919e68",
    (digest_cuda, ""): "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    (digest_cuda, CUDA): "bf55bf31361252ed856cb4cd3c26bed80683af31f4677db51f590cdb0eab1724",
}


@pytest.mark.parametrize(("digest", "text"), VECTORS)
def test_vectors(digest, text):
    assert digest(text) == VECTORS[digest, text]


SAME_PYTHON = [
    ("# A comment.\n", ""),
    ("# A comment.", "# Another, with 'quotes\" and (brackets."),
    ('"""A module."""\n', ""),
    ("A class\n    of two lines.", "Another"),
    ('        r"""What it\n        does."""\n', ""),
    ('    "In" \\\n        " parts."\n', ""),
    ("  # the first", ""),
    ("[\n                a,  # the first\n                b,\n            ]", "[a, b,]"),
    ("SIZE = 3", "SIZE  =  3"),
    ("SIZE = 3", "SIZE \\\n  = 3"),
    ("\n\n\nclass", "\n\n  \n# more\n    # and more\n\nclass"),
    ("\n", "\r\n"),
    ("    ", "  "),  # every level, but also within docstrings and brackets
]


@pytest.mark.parametrize(("old", "new"), SAME_PYTHON)
def test_comments_docstrings_and_layout_of_python_mean_nothing(old, new):
    changed = PYTHON.replace(old, new)
    assert changed != PYTHON and digest_python(changed) == digest_python(PYTHON)


OTHER_PYTHON = [
    ("SIZE = 3", "SIZE = 4"),
    ("# no comment", "# another"),
    ("{SIZE!r", "{SIZE!s"),
    ("# {'x'}", "# {'y'}"),
    ('"""not a docstring"""', '"""something else"""'),
    ("bytes # kept", "bytes # lost"),
    ("\n  as they are", "\n as they are"),
    ("        return None", "            return None"),
    ("        return None", "    return None"),
    ("import os", "importos"),
    ("            return [", "            pass\n        return ["),
]


@pytest.mark.parametrize(("old", "new"), OTHER_PYTHON)
def test_what_python_does_differently_changes_the_digest(old, new):
    changed = PYTHON.replace(old, new)
    assert changed != PYTHON and digest_python(changed) != digest_python(PYTHON)


def test_a_line_that_leaves_its_block_changes_the_digest():
    inside, after = "if a:\n  b()\n  c()\n", "if a:\n  b()\nc()\n"
    assert digest_python(inside) != digest_python(after)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("// What it does.\n", ""),
        ("/* A block\n   comment. */\n", "// Another.\n"),
        ("  // it's large", ""),
        ('  // " opens nothing', " /* ' */"),
        ("/* + c */", ""),
        ("  // a condition", ""),
        ("(float* out, const char* text) {", "(\n    float* out,\n    const char* text\n) {"),
        ("TWICE(x) \\\n  ((x)", "TWICE(x)    ((x)"),
        ("\n  char c", "\n\n\n\tchar c"),
    ],
)
def test_comments_and_layout_of_cuda_mean_nothing(old, new):
    changed = CUDA.replace(old, new)
    assert changed != CUDA and digest_cuda(changed) == digest_cuda(CUDA)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1'000'000", "1'000'001"),
        ("// no comment", "// another"),
        ("nor this", "nor that"),
        ("// kept", "// lost"),
        ("a\n  // kept", "a\n // kept"),
        ("'\"'", "'a'"),
        ("- -b", "--b"),
        ("TWICE(x)", "TWICE (x)"),
        ("#if BIG > 10  // a condition\n", "#if BIG > 10  /* a condition */ "),
        ("/* + c */;", "+ c;"),
        ("common.cuh", "ring.cuh"),
    ],
)
def test_what_cuda_does_differently_changes_the_digest(old, new):
    changed = CUDA.replace(old, new)
    assert changed != CUDA and digest_cuda(changed) != digest_cuda(CUDA)


def stripped(tree: ast.AST) -> str:
    """The syntax of a Python source without its docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
            if is_text and isinstance(first.value.value, str):
                node.body = node.body[1:] or [ast.Pass()] * (not isinstance(node, ast.Module))
    return ast.dump(tree)


def test_the_sources_of_the_package_are_read_as_python_reads_them(monkeypatch):
    """What is hashed still parses, to the same syntax without docstrings."""
    from gpt2cupy import digest

    hashed: list[str] = []
    monkeypatch.setattr(digest, "_hash", lambda text: hashed.append(text) or "")
    for path in sorted((ROOT / "gpt2cupy").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        digest_python(text)
        again = ""
        lines = [line.split(" ", 1) for line in _logical(hashed.pop())]
        for number, (level, code) in enumerate(lines):
            next_level = lines[number + 1][0] if number + 1 < len(lines) else "0"
            empty = code[-1] == ":" and int(next_level) <= int(level)  # of its docstring alone
            again += " " * int(level) + code + " pass" * empty + "\n"
        assert stripped(ast.parse(again)) == stripped(ast.parse(text)), path


def _logical(text: str) -> list[str]:
    """The statements in what is hashed; a string may hold line ends."""
    found: list[str] = []
    for line in text.split("\n") if text else ():
        level, _, _ = line.partition(" ")
        if level.isdigit() and not (found and found[-1].count('"""') % 2):
            found.append(line)
        else:
            found[-1] += "\n" + line
    return found


def test_only_the_standard_library_is_needed():
    """So that any Python can be asked for a digest."""
    code = "import sys, runpy; runpy.run_path(sys.argv[1]); print('numpy' in sys.modules)"
    path = ROOT / "gpt2cupy" / "digest.py"
    done = subprocess.run([sys.executable, "-I", "-c", code, path], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
