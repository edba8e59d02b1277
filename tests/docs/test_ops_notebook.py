"""docs/ops.ipynb runs from top to bottom on the references."""

from __future__ import annotations

import json

import pytest

from gpt2cupy import ops
from gpt2cupy.record import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "ops.ipynb").read_text(encoding="utf-8"))
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def run(capsys, **known):
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(CELLS):
        code = compile("".join(cell["source"]), f"ops.ipynb, code cell {number}", "exec")
        exec(code, namespace)
        namespace |= {name: value for name, value in known.items() if name in namespace}
    return namespace, capsys.readouterr().out


def test_every_cell_runs_without_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # no nvidia-smi: the install cell finds no GPU
    namespace, shown = run(capsys)
    assert "pip" not in shown, "gpt2cupy is here: nothing is installed"
    assert shown.count("skipped: ") == 2
    for name in namespace["CASES"]:
        assert hasattr(ops, name) and f"{name}: reference" in shown
    assert "weight" in shown.splitlines()[-1], "a wrong argument is refused by name"


@pytest.mark.gpu
def test_every_cell_runs_beside_pytorch(tmp_path, monkeypatch, capsys):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("PyTorch sees no GPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def timed(function, arguments):
        function(*arguments)
        return 1.0

    namespace, shown = run(capsys, EXTRA="[cuda13]", median_us=timed)
    assert namespace["RESULTS"].keys() == namespace["CASES"].keys()
    assert "gradients differ by at most" in shown and "skipped: no GPU" not in shown
