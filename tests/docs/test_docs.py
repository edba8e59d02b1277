"""Documents: every Python block runs, and the table of kernel entries is complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_entries import kernel_entries

from gpt2cupy import loading
from gpt2cupy.record import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PAGE_IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
_BLOCK = re.compile(r"^```(python[^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> Iterator[tuple[str, object]]:
    """(kind, code object) of each Python block; tracebacks show the line of the page."""
    text = page.read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        kind = match[1].strip()
        assert kind in ("python", "python gpu"), f"{page.name}: unknown block kind {kind!r}"
        lines_before = text.count("\n", 0, match.start(2))
        yield kind, compile("\n" * lines_before + match[2], page, "exec")


@pytest.fixture
def on_cpu(monkeypatch):
    """device="auto" takes the CPU, whatever this machine has."""
    resolve = loading.resolve_device
    monkeypatch.setattr(
        loading, "resolve_device", lambda device: resolve("cpu" if device == "auto" else device)
    )


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_python_blocks_run(page, on_cpu, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for kind, code in blocks(page):
        if kind == "python":
            exec(code, namespace)


@pytest.mark.gpu
@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_all_blocks_run_on_a_gpu(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for _, code in blocks(page):
        exec(code, namespace)


def test_the_readme_has_blocks_of_both_kinds():
    assert {kind for kind, _ in blocks(ROOT / "README.md")} == {"python", "python gpu"}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_to_files(page):
    targets = re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_the_readme_names_every_make_target():
    targets = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert targets
    assert not [target for target in targets if f"`make {target}`" not in text]


def test_the_table_of_kernels_is_complete():
    text = (ROOT / "cuda_src" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+\.cu)` \| `(\w+)` \|", text, re.MULTILINE)
    assert len(listed) == len(set(listed)), "an entry stands twice"
    assert set(listed) == kernel_entries()
