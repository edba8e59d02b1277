"""Imports run downward only, and each outside library has its place. Read from the syntax trees."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2cupy.record import ROOT

PACKAGE = ROOT / "gpt2cupy"
# From the bottom up: a module may import from the lines before its own, and from its own package.
LAYERS = (
    ("_version", "digest", "errors", "file_kinds", "files"),
    ("config", "output", "quantize"),
    (
        "ids",
        "ops.reference_product",
        "ops.reference_rows",
        "sampling_checks",
        "timing",
        "tokenizer",
        "weights",
    ),
    ("cache", "checkpoint", "ops.reference_cached_attention", "ops.reference_sampling"),
    ("ops.core", "ops.reference", "ops.reference_attention", "sampling", "workspace"),
    ("ops", "record"),
    ("ops.gpt2",),
    ("loading", "shifts", "torch"),
    ("model",),
    ("decode",),
    ("generation",),
    ("lm", "server"),
    ("inspect", "profile", "validate"),
    ("cli",),
    ("__main__",),
)
_LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
# The package's door fetches the public names when they are used, and for type checkers.
DOOR = "__init__"

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def home(module: str) -> str:
    """The name in LAYERS that a module belongs to: its own, or its package's."""
    while module not in _LEVEL and "." in module:
        module = module.rpartition(".")[0]
    assert module in _LEVEL, f"gpt2cupy.{module} has no place in LAYERS"
    return module


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(imported module in full, line), those inside functions too, without TYPE_CHECKING blocks."""
    relative = path.relative_to(PACKAGE).parent.parts
    package = ".".join(["gpt2cupy", *relative])

    def walk(node: ast.AST) -> Iterator[tuple[str, int]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child)
            return
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        if isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(source, package) if node.level else source
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield (f"{base}.{alias.name}" if is_module else base), node.lineno
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")))


def inner_imports(path: Path) -> Iterator[tuple[str, int]]:
    """The same, for modules of gpt2cupy only, without the prefix."""
    for module, line in imports(path):
        if module.split(".")[0] == "gpt2cupy":
            yield module.partition(".")[2] or DOOR, line


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path):
    own = name_of(path)
    if own == DOOR:
        assert {module for module, _ in inner_imports(path)} == {"_version"}
        return
    for module, line in inner_imports(path):
        if home(module) == home(own):
            continue
        # A package's __init__ gathers what its own modules have.
        if path.name == "__init__.py" and module.startswith(f"{own}."):
            continue
        below = _LEVEL[home(module)] < _LEVEL[home(own)]
        assert below, f"{path}:{line}: {own} imports {module}, which is not below it"


def test_no_module_imports_itself_in_a_circle():
    arrows = {
        name_of(path): {module for module, _ in inner_imports(path)} - {name_of(path)}
        for path in MODULES
    }
    while arrows:
        free = {name for name, targets in arrows.items() if not targets & arrows.keys()}
        assert free, f"these import each other: {', '.join(sorted(arrows))}"
        arrows = {name: targets for name, targets in arrows.items() if name not in free}


def python_files() -> Iterator[Path]:
    for folder in ("gpt2cupy", "bench", "tools"):
        yield from (ROOT / folder).rglob("*.py")


def test_torch_and_transformers_have_their_places():
    free = {
        *(PACKAGE / "torch").glob("*.py"),
        # What `validate --against hf` compares with; imported only then.
        PACKAGE / "validate" / "huggingface.py",
    }
    for path in python_files():
        inside = path.relative_to(ROOT).parts
        if path in free or inside[0] == "tools" or inside[:2] == ("bench", "peers"):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [
            alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
        ]
        names += [
            n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
        ]
        roots = {name.split(".")[0] for name in names}
        assert not roots & {"torch", "transformers"}, path


def mentions(path: Path, word: str) -> bool:
    """Whether code (not comments or docstrings) has the word as a name, attribute or import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name) and node.id == word:
            return True
        if isinstance(node, ast.Attribute) and node.attr == word:
            return True
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names.append(getattr(node, "module", None) or "")
            if any(word in name.split(".") for name in names):
                return True
    return False


@pytest.mark.parametrize(
    "word, home",
    [
        ("RawModule", "ops/core/launch.py"),
        ("RawKernel", None),
        ("ElementwiseKernel", None),
        ("nvmath", "ops/core/blas_device.py"),
        ("cublas", "ops/core/blas.py ops/core/blas_device.py"),
        ("cublasLt", "ops/core/blas_device.py"),
        ("createProgram", "ops/core/compiler.py"),
        ("compileProgram", "ops/core/compiler.py"),
    ],
)
def test_each_tool_has_one_home(word, home):
    users = {path.relative_to(PACKAGE).as_posix() for path in MODULES if mentions(path, word)}
    assert users == set((home or "").split())


def test_only_the_compiler_imports_nvrtc():
    for path in MODULES:
        outside = [module for module, _ in imports(path) if "nvrtc" in module]
        names = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and "nvrtc" in [alias.name for alias in node.names]
        ]
        if path.name != "compiler.py":
            assert not outside and not names, path
