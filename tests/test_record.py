"""A record depends on what the measured processes loaded, by its meaning."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import pytest

from gpt2cupy import record
from gpt2cupy.ops.core import cuda_source, launch

sys.path.insert(0, str(record.ROOT / "bench"))
import traced

PYTHON = '"""About it."""\n\nROWS = 4  # of a tile\n'
CUDA = '// About it.\n#include "rows.cuh"\nconstexpr int COLUMNS = 8;\n'


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout of one module and one kernel that includes one file."""
    folder = tmp_path / "cuda_src"
    folder.mkdir()
    (folder / "tile.cu").write_text(CUDA)
    (folder / "rows.cuh").write_text("constexpr int ROWS = 4;\n")
    (tmp_path / "model.py").write_text(PYTHON)
    (tmp_path / "tile.cubin").write_bytes(b"machine code")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setattr(cuda_source, "source_dir", lambda: folder)
    loaded = {("tile.cu", "sm_90", "ELEM=__half"): tmp_path / "tile.cubin"}
    monkeypatch.setattr(launch, "loaded", loaded)
    modules = {"gpt2cupy.model": tmp_path / "model.py", "gpt2cupy.cli": tmp_path / "cli.py"}
    for name in [*sys.modules]:
        if name.startswith("gpt2cupy.") and name != "gpt2cupy.ops.core.launch":
            monkeypatch.delitem(sys.modules, name)
    for name, path in modules.items():
        monkeypatch.setitem(sys.modules, name, Module(path))
    monkeypatch.setitem(sys.modules, "gpt2cupy.ops.core.launch", launch_at(tmp_path))
    for cached in (cuda_source.source_closure, cuda_source.source_digests):
        cached.cache_clear()
    (tmp_path / "launch.py").write_text("")
    yield tmp_path
    for cached in (cuda_source.source_closure, cuda_source.source_digests):
        cached.cache_clear()


class Module:
    def __init__(self, path):
        self.__file__ = str(path)


def launch_at(folder):
    module = Module(folder / "launch.py")
    module.loaded, module.cuda_source = launch.loaded, cuda_source
    return module


def test_a_record_names_what_was_loaded(checkout):
    found = record.loaded()
    assert sorted(found["files"]) == [
        "cuda_src/rows.cuh",
        "cuda_src/tile.cu",
        "launch.py",
        "model.py",
    ]
    machine_code = hashlib.sha256(b"machine code").hexdigest()
    assert found["cubins"] == {"tile.cu sm_90 ELEM=__half": machine_code}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("model.py", "# of a tile", "# of a tile of rows"),
        ("model.py", "About it.", "Another docstring."),
        ("model.py", "ROWS = 4", "ROWS   =   4"),
        ("cuda_src/tile.cu", "// About it.", "/* Another comment. */"),
        ("cuda_src/rows.cuh", "ROWS = 4;", "ROWS = 4;  // of a tile"),
    ],
)
def test_a_comment_and_a_docstring_make_nothing_stale(checkout, file, old, new):
    made = record.loaded()
    change(checkout / file, old, new)
    assert record.changes(made) == [] and record.is_current(made)


def test_a_file_that_was_not_used_makes_nothing_stale(checkout):
    made = record.loaded()
    (checkout / "cuda_src" / "unused.cu").write_text("constexpr int NEW = 1;\n")
    (checkout / "unused.py").write_text("NEW = 1\n")
    assert record.is_current(made)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("model.py", "ROWS = 4", "ROWS = 5"),
        ("cuda_src/tile.cu", "COLUMNS = 8", "COLUMNS = 9"),
        ("cuda_src/rows.cuh", "ROWS = 4", "ROWS = 5"),
    ],
)
def test_a_changed_constant_is_named(checkout, file, old, new):
    made = record.loaded()
    change(checkout / file, old, new)
    assert record.changes(made) == [file] and not record.is_current(made)


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_what_another_process_loaded_belongs_to_the_record(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "_elsewhere", [])
    other = {"files": {"cuda_src/norm.cu": "a"}, "cubins": {"norm.cu sm_90 ELEM=float": "b"}}
    record.add_loaded(other)
    written = record.write(tmp_path / "record.json", {}, gpu=False)
    assert written["files"]["cuda_src/norm.cu"] == "a" and written["cubins"] == other["cubins"]
    assert json.loads((tmp_path / "record.json").read_text()) == written


def test_a_traced_command_tells_what_it_loaded(monkeypatch):
    monkeypatch.setattr(record, "_elsewhere", [])
    options = ("--quiet", "--max-new-tokens", "2", "--device", "cpu")
    done = traced.run("gpt2cupy", "generate", "A", *options)
    assert done.returncode == 0, done.stderr
    files = record._elsewhere[0]["files"].keys()
    assert {f"gpt2cupy/{name}.py" for name in ("model", "generation/engine", "ops/norm")} <= files
    assert not files & {"gpt2cupy/ops/__init__.py", "gpt2cupy/lm/loader.py", "gpt2cupy/cli/app.py"}


def test_only_what_was_used_is_loaded():
    code = (
        "from gpt2cupy import ops, record; import numpy as np\n"
        "ops.layer_norm(np.ones((1, 4), np.float32), *np.ones((2, 4), np.float32))\n"
        "print(*record.loaded()['files'])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT, check=True)
    assert "gpt2cupy/ops/norm.py" in done.stdout.split()
    assert not {"gpt2cupy/ops/cached_attention.py", "gpt2cupy/ops/gpt2/step.py"} & {
        *done.stdout.split()
    }
