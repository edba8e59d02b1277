"""Documents: every Python block runs, and the table of kernel entries is complete."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_entries import kernel_entries

from gpt2cupy import loading
from gpt2cupy.record import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
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


def test_blocks_of_both_kinds_are_found():
    assert {kind for kind, _ in blocks(ROOT / "docs" / "how-it-works.md")} == {
        "python",
        "python gpu",
    }
    assert {kind for kind, _ in blocks(ROOT / "README.md")} == {"python"}


@pytest.mark.parametrize("page", PAGES, ids=PAGE_IDS)
def test_links_lead_to_files(page):
    missing = []
    for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        if not other.exists() or (anchor and anchor not in anchors(other)):
            missing.append(target + anchor)
    assert not missing


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {"#" + re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_project_has_one_address():
    """Clone lines, links and the notebook name the repository of pyproject.toml."""
    url = re.search(r'^Homepage = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    texts = [page.read_text(encoding="utf-8") for page in PAGES]
    for notebook in ("colab.ipynb", "ops.ipynb"):
        texts.append((ROOT / "docs" / notebook).read_text(encoding="utf-8"))
    found = re.findall(r"https://github\.com/[\w-]*gpt2cupy[\w-]*/[\w-]+", "\n".join(texts))
    assert len(found) >= 3 and set(found) == {url}


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
