"""Imports run downward only, and each outside library has its place. Read from the syntax trees."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpt2cupy.record import ROOT

PACKAGE = ROOT / "gpt2cupy"
# From the bottom up: a module may import from its own line only what stands left of it (or the
# same package), and anything from the lines before.
LAYERS = (
    ("_version", "digest", "errors", "files", "output", "turns"),
    ("config",),
    ("quantize",),
    ("ids", "weights", "cache", "vocabulary", "tokenizer_files", "tokenizer", "timing"),
    ("ops.reference_sampling", "ops.reference_rows", "ops.reference"),
    ("ops.device", "ops.compiler", "ops.tape", "ops.signature", "ops.launch", "ops.registry"),
    ("ops.blas", "ops"),
    ("torch",),
    ("workspace", "sampling", "shifts", "model"),
    ("checkpoint", "decode"),
    ("loading", "request", "engine", "record"),
    ("text", "prompts", "scoring", "held", "lm", "console"),
    ("occupancy", "info", "kernel_report", "profile", "validate", "cli", "__main__"),
)
_FLAT = [name for layer in LAYERS for name in layer]
# The convenient constructors of GPT2 reach upward, inside the function.
ALLOWED = {("model", "loading"): {"from_pretrained", "random"}}
# The package's door fetches the public names when they are used, and for type checkers.
DOOR = "__init__"

MODULES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def place(module: str) -> int:
    """Position from the bottom; a module without a line of its own has its package's."""
    while module not in _FLAT and "." in module:
        module = module.rpartition(".")[0]
    assert module in _FLAT, f"gpt2cupy.{module} has no place in LAYERS"
    return _FLAT.index(module)


def imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """(imported module in full, function it stands in, line), without TYPE_CHECKING blocks."""
    relative = path.relative_to(PACKAGE).parent.parts
    package = ".".join(["gpt2cupy", *relative])

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str, int]]:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                yield from walk(child, function)
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, function, node.lineno
        if isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(source, package) if node.level else source
            for alias in node.names:
                inner = PACKAGE.parent.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
                yield (f"{base}.{alias.name}" if is_module else base), function, node.lineno
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), "")


def inner_imports(path: Path) -> Iterator[tuple[str, str, int]]:
    """The same, for modules of gpt2cupy only, without the prefix."""
    for module, function, line in imports(path):
        if module.split(".")[0] == "gpt2cupy":
            yield module.partition(".")[2] or DOOR, function, line


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downward(path):
    own = name_of(path)
    if own == DOOR:
        assert {module for module, _, _ in inner_imports(path)} == {"_version"}
        return
    for module, function, line in inner_imports(path):
        same_package = "." in own or path.name == "__init__.py"
        top = own.split(".")[0]
        if same_package and module.split(".")[0] == top and place(module) == place(own):
            continue
        if function in ALLOWED.get((own, module), ()):
            continue
        assert place(module) < place(own), f"{path}:{line}: {own} imports {module}, which is above"


def test_the_exceptions_are_still_needed():
    for (own, wanted), functions in ALLOWED.items():
        path = PACKAGE / f"{own}.py"
        found = {function for module, function, _ in inner_imports(path) if module == wanted}
        assert found == functions


def python_files() -> Iterator[Path]:
    for folder in ("gpt2cupy", "bench", "tools"):
        yield from (ROOT / folder).rglob("*.py")


def test_torch_and_transformers_have_their_places():
    free = {
        ROOT / "gpt2cupy" / "torch.py",
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
        ("nvmath", "ops/core/blas.py"),
        ("cublas", "ops/core/blas.py"),
        ("cublasLt", "ops/core/blas.py"),
        ("createProgram", "ops/core/compiler.py"),
        ("compileProgram", "ops/core/compiler.py"),
    ],
)
def test_each_tool_has_one_home(word, home):
    users = {path.relative_to(PACKAGE).as_posix() for path in MODULES if mentions(path, word)}
    assert users == ({home} if home else set())


def test_only_the_compiler_imports_nvrtc():
    for path in MODULES:
        outside = [module for module, _, _ in imports(path) if "nvrtc" in module]
        names = [
            node
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and "nvrtc" in [alias.name for alias in node.names]
        ]
        if path.name != "compiler.py":
            assert not outside and not names, path
