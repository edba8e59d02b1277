"""The embedded model: what ships is what was measured, and its card says what the record says."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gpt2cupy
from gpt2cupy import record

FOLDER = Path(gpt2cupy.__file__).parent / "models" / "shakespeare"
MEASURED = json.loads((record.RESULTS / "shakespeare.json").read_text())["results"]


def test_the_shipped_weights_are_the_measured_ones():
    weights = (FOLDER / "model.safetensors").read_bytes()
    assert hashlib.sha256(weights).hexdigest() == MEASURED["weights_sha256"]
    assert MEASURED["bits_per_byte"] <= 2.20


def test_the_card_gives_the_recorded_score():
    card = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"**{MEASURED['bits_per_byte']:.4f} bits per byte**" in card
    assert f"window of {MEASURED['window']} tokens, stride {MEASURED['stride']}" in card


def test_the_folder_stays_small():
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 12e6
