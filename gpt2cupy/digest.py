"""The digest of a source by its meaning: comments, docstrings and layout change nothing in it.

Records, the kernel cache and the measured decode paths are keyed by it. The scanners are our
own, not Python's ``tokenize`` or ``ast``: those read the same text differently from version to
version, and a digest must be the same on all of them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

_PYTHON = re.compile(
    r"""
    (?P<string> [rRbBuUfFtT]{0,2}
        (?: \"\"\" (?: [^"\\] | \\. | "(?!"") )* \"\"\"
          | ''' (?: [^'\\] | \\. | '(?!'') )* '''
          | " (?: [^"\\\n] | \\. )* "
          | ' (?: [^'\\\n] | \\. )* ' ) )
    | (?P<comment> \#[^\n]* )
    | (?P<splice> \\\n )
    | (?P<newline> \n )
    | (?P<blank> [ \t\f]+ )
    | (?P<word> \w+ )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
_CUDA = re.compile(
    r"""
    (?P<string> (?: u8 | [uUL] )? R" (?P<mark> [^()\\\s]{0,16} ) \( .*? \) (?P=mark) "
          | " (?: [^"\\\n] | \\. )* "
          | ' (?: [^'\\\n] | \\. )+ ' )
    | (?P<comment> // (?: [^\\\n] | \\. )* | /\* .*? \*/ )
    | (?P<splice> \\\n )
    | (?P<newline> \n )
    | (?P<blank> [ \t\f\v]+ )
    | (?P<word> [A-Za-z_]\w* | \.?[0-9] (?: [eEpP][+-] | '\w | [\w.] )* )
    | (?P<other> . )
    """,
    re.VERBOSE | re.DOTALL,
)
# Beside these a blank means nothing in CUDA, but for those in a line of the preprocessor.
_PUNCTUATION = frozenset("()[]{},;")
_HEADS = frozenset({"class", "def", "async"})


def digest_python(text: str) -> str:
    """SHA-256 in hex of a Python source without comments, docstrings and layout.

    A string that is the first statement of a module, a class or a function is a docstring.
    Every other string counts as it stands. Of the indentation only the level counts.

    Parameters
    ----------
    text : str
        As Python 3.10 reads it: a quote within an f-string is not that of the f-string.
    """
    kept: list[str] = []
    levels, head_level = [0], 0  # a module's docstring stands at level 0
    for indent, tokens in _logical_lines(text):
        while indent < levels[-1]:
            levels.pop()
        if indent > levels[-1]:
            levels.append(indent)
        depth = len(levels) - 1
        if depth == head_level and all(map(_is_plain_string, tokens)):
            head_level = -1
            continue
        is_head = tokens[0][1] in _HEADS and tokens[-1][1] == ":"
        head_level = depth + 1 if is_head else -1
        kept.append(f"{depth} {_joined(tokens, _blank_between_words)}")
    return _hash("\n".join(kept))


def digest_cuda(text: str) -> str:
    """SHA-256 in hex of a CUDA source without comments and layout."""
    return _hash(cuda_code(text))


def cuda_code(text: str) -> str:
    """A CUDA source without comments, blanks folded.

    Lines of the preprocessor stay lines; other line ends are blanks.
    """
    kept: list[str] = []
    lines: list[list[tuple[str, str]]] = [[]]
    for kind, word in _tokens(_CUDA, text):
        if kind == "newline":
            lines.append([])
        elif kind != "splice":
            lines[-1].append(("blank", " ") if kind == "comment" else (kind, word))
    code: list[tuple[str, str]] = []
    for line in [*lines, [("other", "#")]]:
        first = next((word for kind, word in line if kind != "blank"), "")
        if first != "#":
            code += [*line, ("blank", " ")]
            continue
        if any(kind != "blank" for kind, _ in code):
            kept.append(_joined(code, lambda a, b: not {a[-1], b[0]} & _PUNCTUATION))
        kept.append(_joined(line, lambda a, b: True))
        code = []
    return "\n".join(kept[:-1])


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _tokens(scanner: re.Pattern[str], text: str) -> list[tuple[str, str]]:
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return [(match.lastgroup or "", match[0]) for match in scanner.finditer(text)]


def _logical_lines(text: str) -> list[tuple[int, list[tuple[str, str]]]]:
    """The statements of a Python source: column, and (kind, text) of the tokens."""
    found: list[tuple[int, list[tuple[str, str]]]] = []
    indent, brackets = 0, 0
    line: list[tuple[str, str]] = []
    for kind, word in [*_tokens(_PYTHON, text), ("newline", "\n")]:
        if kind == "newline" and not brackets:
            if line:
                found.append((indent, _without_blank_end(line)))
            indent, line = 0, []
        elif kind in ("newline", "splice", "blank"):
            if line:
                line.append(("blank", " "))
            elif kind == "blank":
                indent = len(word.replace("\f", "").expandtabs())
        elif kind != "comment":
            brackets += (word in "([{") - (word in ")]}")
            line.append((kind, word))
    return found


def _is_plain_string(token: tuple[str, str]) -> bool:
    """Whether it may be a part of a docstring: no bytes, nothing to be formatted."""
    kind, word = token
    prefix = word[: len(word) - len(word.lstrip("rRbBuUfFtT"))]
    return kind == "blank" or (kind == "string" and not set(prefix.lower()) & set("bft"))


def _without_blank_end(line: list[tuple[str, str]]) -> list[tuple[str, str]]:
    while line[-1][0] == "blank":
        line.pop()
    return line


def _blank_between_words(before: str, after: str) -> bool:
    """Whether a blank of Python may separate what else would be one token."""
    return all(each.isalnum() or each in "_'\"." for each in (before[-1], after[0]))


def _joined(tokens: list[tuple[str, str]], needs_blank: Callable[[str, str], bool]) -> str:
    """The tokens in a row, with one blank where there were some and they are needed."""
    parts: list[str] = []
    blank = False
    for kind, word in tokens:
        if kind == "blank":
            blank = bool(parts)
            continue
        if blank and needs_blank(parts[-1], word):
            parts.append(" ")
        parts.append(word)
        blank = False
    return "".join(parts)
