"""The package from outside: what importing loads, and its public names."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import gpt2cupy
from gpt2cupy.record import ROOT

HEAVY = ("cupy", "torch", "huggingface_hub", "transformers", "tiktoken", "nvmath")


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_nothing_heavy():
    loaded = python(f"import gpt2cupy, sys; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


def test_the_cpu_needs_no_gpu_library():
    needless = [name for name in HEAVY if name != "tiktoken"]
    code = (
        "import gpt2cupy, sys\n"
        "with gpt2cupy.load(device='cpu') as lm: lm.generate('a', max_new_tokens=2)\n"
        f"print([m for m in {needless} if m in sys.modules])"
    )
    assert python(code) == "[]"


def test_every_public_name_is_there():
    assert all(getattr(gpt2cupy, name) is not None for name in gpt2cupy.__all__)
    assert dir(gpt2cupy) == sorted(gpt2cupy.__all__)
    with pytest.raises(AttributeError, match="nothing"):
        _ = gpt2cupy.nothing


def test_environment_variables_are_few_and_documented():
    sources = [
        path
        for folder in ("gpt2cupy", "cuda_src", "tests", "bench", "tools", ".ci")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".cu", ".cuh", "") and path.is_file()
    ]
    texts = [path.read_text(encoding="utf-8") for path in [*sources, ROOT / "Makefile"]]
    used = {name for text in texts for name in re.findall(r"\bGPT2CUPY_[A-Z_]+[A-Z]\b", text)}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "GPT2CUPY_CACHE_DIR" in used and len(used) <= 5
    assert {name for name in used if f"| `{name}` |" not in readme} == set()
