"""docs/colab.ipynb runs from top to bottom on the NumPy engine."""

from __future__ import annotations

import json

import pytest

from gpt2cupy import loading
from gpt2cupy.record import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "colab.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def tags(cell) -> set[str]:
    return set(cell["metadata"].get("tags", []))


@pytest.fixture
def no_gpu(monkeypatch):
    """The notebook sees no GPU, nor do the commands that it starts."""
    resolve = loading.resolve_device
    monkeypatch.setattr(
        loading, "resolve_device", lambda device: resolve("cpu" if device == "auto" else device)
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=":")


def test_every_cell_runs_without_a_gpu(no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands = {name for cell in CELLS for name in tags(cell)}
    assert commands == {"validate", "profile"}
    namespace = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(CELLS):
        code = compile("".join(cell["source"]), f"colab.ipynb, code cell {number}", "exec")
        exec(code, namespace)
        shown.append(capsys.readouterr().out)
    whole = "".join(shown)
    assert "100 of 100 tokens are the same" in whole  # naive and cached, in float32
    assert "pip" not in whole, "gpt2cupy is here: nothing is installed"
    # Cells that need a GPU, nsys or a download say so; the others did something.
    skips = [text for text in shown if text.startswith("skipped: ")]
    assert len(skips) == 3 and sum("no GPU" in text for text in skips) == 2
