"""docs/api.md is what the docstrings say."""

from __future__ import annotations

import importlib.util
import re

import pytest

import gpt2cupy
from gpt2cupy.record import ROOT

pytest.importorskip("griffe", reason="docs/api.md is compared where griffelib is installed")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("make_api", ROOT / "tools" / "make_api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_current(tool):
    written = tool.PAGE.read_text(encoding="utf-8")
    assert written == tool.page(), "the docstrings changed: run make docs"


def test_every_public_name_and_field_is_there(tool):
    text = tool.page()
    for name in set(gpt2cupy.__all__) - {"__version__"}:
        assert f"## gpt2cupy.{name}\n" in text
    for name in ("Engine", "KVCache", "DecodeState", "Weights", "launch"):
        assert re.search(rf"^### gpt2cupy\.[\w.]+\.{name}$", text, re.MULTILINE)
    for internal in ("GPT2.run_packed", "SamplingParams.plain"):
        assert f"### {internal}\n" not in text
    for field in vars(gpt2cupy.SamplingParams()):
        assert f"- `{field}` (" in text
