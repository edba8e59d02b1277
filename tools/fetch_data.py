"""Get the data that some tests and tools need from its public origin, checked by SHA-256.

    python tools/fetch_data.py FOLDER
    GPT2CUPY_TEST_DATA=FOLDER make test

GPT-2's byte-pair merges (MIT, OpenAI) and the tiny Shakespeare corpus (public
domain). A file that is there and right is not fetched again.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import urllib.request
from pathlib import Path
from typing import NamedTuple


class Item(NamedTuple):
    """One file: its name here, where it comes from, and what it must be."""

    name: str
    url: str
    size: int
    sha256: str


ITEMS = (
    Item(
        "gpt2-merges.bpe",
        "https://openaipublic.blob.core.windows.net/gpt-2/models/124M/vocab.bpe",
        456_318,
        "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    ),
    Item(
        "tinyshakespeare.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394,
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
)


def is_right(item: Item, data: bytes) -> bool:
    return hashlib.sha256(data).hexdigest() == item.sha256


def fetch(item: Item, folder: Path) -> str:
    """Put the file into the folder unless it is there; returns what was done."""
    path = folder / item.name
    if path.is_file() and is_right(item, path.read_bytes()):
        return "is there"
    with urllib.request.urlopen(item.url, timeout=60) as answer:
        # One byte more than expected is enough to know that it is another file.
        data = answer.read(item.size + 1)
    if not is_right(item, data):
        raise ValueError(f"{item.url} does not have the SHA-256 {item.sha256}")
    # A file appears under its name only when it is whole.
    part = path.with_suffix(".part")
    part.write_bytes(data)
    part.replace(path)
    return f"fetched {len(data)} bytes"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to put the files")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for item in ITEMS:
        try:
            print(f"{item.name}: {fetch(item, folder)}")
        except (OSError, ValueError) as error:
            print(f"{item.name}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
