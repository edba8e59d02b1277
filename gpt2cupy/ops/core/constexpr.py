"""Constants of the kernels, read from their text: what Python and CUDA share is declared once.

Reads ``constexpr int NAME = expression;`` at the beginning of a line, templates of one int
parameter among them (``NAME<ARGUMENT>``), and ``#define NAME 123``. Expressions have integers,
macros such as K and HS, other constants, arithmetic, comparisons and ``?:``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import CompileError

_DECLARED = re.compile(
    r"^(?:template <int (?P<parameter>\w+)>\n)?constexpr (?:int|unsigned|bool) (?P<name>\w+) = "
    r"(?P<value>[^;,]+);|^#define (?P<macro>\w+) (?P<number>\d+)\b",
    re.MULTILINE,
)
# Neither comments nor the value that a macro has where none is given.
_IGNORED = re.compile(r"//[^\n]*|^#ifndef (\w+)\n#define \1 .*\n#endif", re.MULTILINE)
_WITH_ARGUMENT = re.compile(r"\b(\w+)<(\w+)>")
_TEMPLATE = "template_"
_TO_PYTHON = (("&&", " and "), ("||", " or "), ("/", "//"), ("\n", " "))


class Constants(dict[str, int]):
    """The constants of some sources by name; each is evaluated when it is first asked for.

    Parameters
    ----------
    texts : iterable of str
        A source and all that it includes.
    sizes : mapping of str to int
        Macros, and template parameters of constants that are asked for without an argument.

    Raises
    ------
    CompileError
        When a name is asked for that no text declares, or whose expression has more than
        this module reads.
    """

    def __init__(self, texts: Iterable[str], sizes: Mapping[str, int]) -> None:
        super().__init__(sizes)
        # By name: template parameter and expression of every declaration.
        self._declared: dict[str, set[tuple[str | None, str]]] = {}
        for text in texts:
            for found in _DECLARED.finditer(_IGNORED.sub("", text)):
                name, value = found["name"] or found["macro"], found["value"] or found["number"]
                self._declared.setdefault(name, set()).add((found["parameter"], value))

    def __missing__(self, name: str) -> int:
        self[name] = value = self.evaluate(name, None)
        return value

    def evaluate(self, name: str, argument: int | None) -> int:
        """The value of a constant, with an argument for its template parameter."""
        declared = self._declared.get(name, ())
        if len(declared) != 1:
            count = "several constants" if declared else "no constant"
            raise CompileError(
                f"the kernels declare {count} {name}",
                where="cuda_src",
                remedy="Declare it once as `constexpr int` at the beginning of a line, or pass it "
                "as a size if it is a macro.",
            )
        ((parameter, expression),) = declared
        known = {} if parameter is None or argument is None else {parameter: argument}
        try:
            return int(eval(_python(expression), {"__builtins__": {}}, _Names(self, known)))
        except (SyntaxError, TypeError) as error:
            raise CompileError(
                f"the value of {name} cannot be read: {expression}",
                where="cuda_src",
                remedy="Write it with integers, other constants, arithmetic and ?: alone.",
            ) from error


class _Names(dict[str, Any]):
    """The names of an expression: those of templates are functions of their argument."""

    def __init__(self, constants: Constants, known: Mapping[str, int]) -> None:
        super().__init__(known)
        self._constants = constants

    def __missing__(self, name: str) -> Any:
        if name.startswith(_TEMPLATE):
            return functools.partial(self._constants.evaluate, name.removeprefix(_TEMPLATE))
        return self._constants[name]


def _python(expression: str) -> str:
    """An expression of C++ as one of Python; ?: may be nested behind its colon alone."""
    test, mark, rest = expression.partition("?")
    if mark:
        yes, _, no = rest.partition(":")
        return f"({_python(yes)} if {_python(test)} else {_python(no)})"
    expression = _WITH_ARGUMENT.sub(_TEMPLATE + r"\1(\2)", expression)
    for theirs, ours in _TO_PYTHON:
        expression = expression.replace(theirs, ours)
    return expression.strip()
