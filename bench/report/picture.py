"""A picture of the documents: drawn from records, and marked with what it shows.

A picture is drawn from points, which are taken from records without matplotlib. Their hash
stands in the file, so that one that is not that of its records is found.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2cupy.profile.plot import matplotlib_figure

from .layout import Record, caption

# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000")
KEY = "Points"  # of the hash in a PNG's text

Found = dict[str, Record]
Points = Any  # what JSON can hold


@dataclass(frozen=True)
class Picture:
    """A picture: its file in docs/, the records it needs and may use, its points and axes."""

    file: str
    title: str
    needs: str
    uses: tuple[str, ...]
    points: Callable[[Found], Points]
    draw: Callable[[Any, Points], None]
    note: Callable[[Points], str]

    def block(self, found: Found) -> str:
        """What stands in the document: the picture, what it shows, and where that comes from."""
        note = f"{self.title}. {self.note(self.points(found))}"
        return f"![{self.title}]({self.file})\n{caption(found[self.needs], note)}"

    def is_current(self, folder: Path, found: Found) -> bool:
        """Whether the file shows what the records hold."""
        path = folder / self.file
        return path.is_file() and png_text(path).get(KEY) == digest(self.points(found))

    def save(self, folder: Path, found: Found) -> Path:
        """Draw it; raises InputError without matplotlib."""
        points, path = self.points(found), folder / self.file
        figure = matplotlib_figure()(figsize=(8, 4.2), layout="constrained")
        self.draw(figure, points)
        figure.savefig(path, dpi=90, metadata={KEY: digest(points), "Software": None})
        return path


def digest(points: Points) -> str:
    return hashlib.sha256(json.dumps(points, sort_keys=True).encode()).hexdigest()


def png_text(path: Path) -> dict[str, str]:
    """The text that a PNG carries (its tEXt chunks)."""
    data, place, found = path.read_bytes(), 8, {}
    while place + 8 <= len(data):
        size, kind = struct.unpack(">I4s", data[place : place + 8])
        if kind == b"tEXt":
            key, _, text = data[place + 8 : place + 8 + size].partition(b"\0")
            found[key.decode("latin-1")] = text.decode("latin-1")
        place += size + 12
    return found
