"""From sources to cubins without a GPU: the cache, its key, and what goes wrong."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest

from gpt2cupy.errors import CompileError, DeviceError, InputError
from gpt2cupy.ops import compiler, launch
from gpt2cupy.record import ROOT

pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")

ARCH = "sm_90"
HALF = {"ELEM": "__half"}
WANTED = [
    (source, defines)
    for source, defines in compiler.variants((64,))
    if defines.get("ELEM", "__half") == "__half"
]
# Asks for every kernel in a fresh process; whoever compiles there stops with an error.
_SECOND = """
from gpt2cupy.ops import compiler
import gpt2cupy.ops.compiler as module
def refuse(*arguments): raise AssertionError("compiled again")
module.compile_source = refuse
wanted = [(s, d) for s, d in compiler.variants((64,)) if d.get("ELEM", "__half") == "__half"]
print(sum(compiler.cubin(s, d, "sm_90").stat().st_size > 0 for s, d in wanted))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty kernel cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(folder))
    compiler._process_dir.cache_clear()
    return folder


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache with every kernel for one architecture, dtype and head size."""
    folder = tmp_path_factory.mktemp("filled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPT2CUPY_CACHE_DIR", str(folder))
        for source, defines in WANTED:
            compiler.cubin(source, defines, ARCH)
    return folder


@pytest.fixture
def fake(monkeypatch):
    """Compiling costs nothing: counts the calls instead."""
    calls = []

    def compile_source(source, options):
        calls.append((source, tuple(options)))
        return b"cubin of " + source.encode()

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    return calls


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the kernels that a test may change."""
    copy = tmp_path / "cuda_src"
    shutil.copytree(compiler.source_dir(), copy)
    monkeypatch.setattr(compiler, "source_dir", lambda: copy)
    compiler.source_closure.cache_clear()
    yield copy
    compiler.source_closure.cache_clear()


def test_every_source_is_known():
    there = {path.name for path in compiler.source_dir().glob("*.cu")}
    assert set(compiler.SOURCES) == there


def test_every_kernel_compiles_and_has_its_entries(filled):
    cubins = sorted(filled.glob("*.cubin"))
    assert len(cubins) == len(WANTED) == len(compiler.SOURCES)
    for path in cubins:
        assert path.read_bytes()[:4] == b"\x7fELF", path
    by_source = {path.name.split("-")[0] + ".cu": path.read_bytes() for path in cubins}
    for kernel in every_kernel():
        section = f".text.{kernel.entry}\0".encode()
        assert section in by_source[kernel.source], kernel.entry


def every_kernel() -> list[launch.Kernel]:
    """Every Kernel that a module of ops declares."""
    # Some modules share their name with a function of ops: ask for them by their full name.
    names = ("attention", "embedding", "layout", "linear", "norm", "sampling")
    modules = [importlib.import_module(f"gpt2cupy.ops.{name}") for name in names]
    values = [value for module in modules for value in vars(module).values()]
    values += [kernel for value in values if isinstance(value, dict) for kernel in value.values()]
    found = [value for value in values if isinstance(value, launch.Kernel)]
    assert {kernel.source for kernel in found} == set(compiler.SOURCES)
    return found


def test_a_second_process_compiles_nothing(filled):
    second = subprocess.run(
        [sys.executable, "-c", _SECOND],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"GPT2CUPY_CACHE_DIR": str(filled)},
    )
    assert second.returncode == 0, second.stderr
    assert int(second.stdout) == len(WANTED)


def test_a_process_with_an_empty_cache_would_compile(tmp_path):
    # The test above can fail: the same process refuses when there is something to compile.
    second = subprocess.run(
        [sys.executable, "-c", _SECOND],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"GPT2CUPY_CACHE_DIR": str(tmp_path)},
    )
    assert second.returncode != 0 and "compiled again" in second.stderr


def test_the_key_holds_all_that_matters(cache, fake):
    first = compiler.cubin("norm.cu", HALF, ARCH)
    assert compiler.cubin("norm.cu", HALF, ARCH) == first and len(fake) == 1
    others = {
        compiler.cubin("norm.cu", {"ELEM": "float"}, ARCH),
        compiler.cubin("norm.cu", HALF, "sm_80"),
        compiler.cubin("embedding.cu", HALF, ARCH),
    }
    assert first not in others and len(others) == 3 and len(fake) == 4


def test_another_nvrtc_changes_the_key(cache, fake, monkeypatch):
    first = compiler.cubin("norm.cu", HALF, ARCH)
    monkeypatch.setattr(compiler, "nvrtc_version", lambda: (99, 0))
    assert compiler.cubin("norm.cu", HALF, ARCH) != first


def test_a_changed_include_changes_the_key(cache, fake, sources):
    before = {s: compiler.cubin(s, HALF, ARCH) for s in ("linear.cu", "norm.cu")}
    include = sources / "activation.cuh"
    include.write_text(include.read_text() + "// changed\n")
    compiler.source_closure.cache_clear()
    assert compiler.cubin("linear.cu", HALF, ARCH) != before["linear.cu"]
    assert compiler.cubin("norm.cu", HALF, ARCH) == before["norm.cu"], "norm.cu does not include it"


def test_a_cache_that_cannot_be_written_warns_and_works(tmp_path, fake, monkeypatch):
    # A file in the way fails for every user, also for root, whom read-only folders do not stop.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    compiler._process_dir.cache_clear()
    with pytest.warns(RuntimeWarning, match="GPT2CUPY_CACHE_DIR"):
        path = compiler.cubin("norm.cu", HALF, ARCH)
    assert path.read_bytes() == b"cubin of norm.cu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.cubin("norm.cu", HALF, ARCH) == path, "compiled once per process"
    assert len(fake) == 1


def test_a_read_only_cache_warns_and_works(cache, fake):
    cache.mkdir()
    cache.chmod(0o555)
    if os.access(cache, os.W_OK):
        pytest.skip("this user may write to read-only folders (root)")
    with pytest.warns(RuntimeWarning, match="GPT2CUPY_CACHE_DIR"):
        assert compiler.cubin("norm.cu", HALF, ARCH).is_file()
    cache.chmod(0o755)


def test_a_read_only_cache_is_still_read(cache, fake):
    path = compiler.cubin("norm.cu", HALF, ARCH)
    cache.chmod(0o555)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiler.cubin("norm.cu", HALF, ARCH) == path
    cache.chmod(0o755)


@pytest.mark.parametrize("step", ["fdopen", "replace"])
def test_no_partial_file_is_left(cache, fake, monkeypatch, step):
    class Interrupted(BaseException):
        """As Ctrl-C would be."""

    def fail(*arguments, **options):
        raise Interrupted

    monkeypatch.setattr(compiler.os, step, fail)
    with pytest.raises(Interrupted):
        compiler.cubin("norm.cu", HALF, ARCH)
    assert list(cache.iterdir()) == []


def test_a_source_that_does_not_compile_says_where_and_leaves_nothing(cache, sources):
    broken = sources / "embedding.cu"
    broken.write_text(broken.read_text() + "this is not C++;\n")
    with pytest.raises(CompileError, match=r"embedding\.cu") as caught:
        compiler.cubin("embedding.cu", HALF, ARCH)
    assert caught.value.remedy and re.search(r"embedding\.cu\(\d+\): error", caught.value.what)
    assert not cache.exists() or not list(cache.iterdir())


def test_an_unknown_architecture_names_the_remedy(cache):
    with pytest.raises(CompileError, match=r"NVRTC \d+\.\d+") as caught:
        compiler.cubin("embedding.cu", HALF, "sm_12345")
    assert "NVRTC 12.8" in caught.value.remedy
    assert isinstance(caught.value, DeviceError)


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", "/a")
    assert str(compiler.cache_dir()) == "/a"
    monkeypatch.delenv("GPT2CUPY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(compiler.cache_dir()) == "/b/gpt2cupy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(compiler.cache_dir()) == "/c/.cache/gpt2cupy"


# -- the launcher, as far as it goes without a GPU -----------------------------------------------


class Memory:
    """Where a stand-in for a device array lies."""

    def __init__(self, ptr: int, device_id: int) -> None:
        self.ptr, self.device_id = ptr, device_id


class DeviceArray:
    """What launch() looks at in an array."""

    def __init__(self, shape, dtype, *, ptr=4096, device=0, contiguous=True):
        host = np.empty(shape, dtype)
        self.shape, self.dtype, self.itemsize = host.shape, host.dtype, host.itemsize
        self.data = Memory(ptr, device)
        self._c_contiguous = contiguous
        self.flags = type("Flags", (), {"c_contiguous": contiguous})


KERNEL = launch.Kernel(
    "norm.cu", "layer_norm", "x: float32[N,C], w: ELEM[C]?, out: ELEM[N,C], eps: float, N, C"
)


@pytest.fixture
def launched(monkeypatch):
    """The launches that got past the checks: (grid, block, values)."""
    calls = []
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    monkeypatch.setattr(launch, "_function", lambda *key: lambda *call: calls.append(call))
    return calls


def try_launch(**changed):
    half = np.dtype(np.float16)
    arrays = {
        "x": DeviceArray((3, 8), np.float32),
        "w": DeviceArray((8,), half),
        "out": DeviceArray((3, 8), half),
    } | changed
    launch.launch(KERNEL, (1,), (32,), (*arrays.values(), 1e-5), elem=half)


def test_scalars_are_cast_and_letters_bound(launched):
    try_launch()
    (_, _, values), *_ = launched
    assert [type(value) for value in values[3:]] == [np.float32, np.int32, np.int32]
    assert values[4:] == (3, 8)
    try_launch(w=None)
    assert launched[-1][2][1] == launch.NULL


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"x": DeviceArray((3, 8), np.float64)}, r"x is float64\[3, 8\].*float32\[N, C\]"),
        ({"w": DeviceArray((8,), np.float32)}, r"w is float32\[8\].*float16\[C=8\]"),
        ({"w": DeviceArray((9,), np.float16)}, r"w is float16\[9\].*float16\[C=8\]"),
        ({"out": DeviceArray((2, 8), np.float16)}, r"out is float16\[2, 8\].*\[N=3, C=8\]"),
        ({"out": DeviceArray((24,), np.float16)}, r"out is float16\[24\].*\[N=3, C=8\]"),
        ({"x": DeviceArray((3, 8), np.float32, contiguous=False)}, "not contiguous"),
        ({"x": DeviceArray((3, 8), np.float32, device=1)}, "on device 1 .* on device 0"),
        ({"x": DeviceArray((3, 8), np.float32, ptr=4100)}, "aligned to 16 bytes"),
    ],
)
def test_launch_refuses(launched, changed, says):
    with pytest.raises(InputError, match=says) as caught:
        try_launch(**changed)
    assert "norm.cu: layer_norm" in str(caught.value) and caught.value.remedy
    assert launched == []


def test_rows_that_cannot_be_aligned_are_taken(launched):
    half = np.dtype(np.float16)
    odd = {"x": DeviceArray((3, 7), np.float32, ptr=4), "w": None}
    try_launch(**odd, out=DeviceArray((3, 7), half, ptr=14))
    assert len(launched) == 1


@pytest.mark.parametrize(
    "source, elem, head_size, says",
    [
        ("norm.cu", np.dtype(np.float64), None, "float64"),
        ("attention_decode.cu", np.dtype(np.float16), 129, "129"),
        ("attention_decode.cu", np.dtype(np.float16), 0, "up to 128"),
    ],
)
def test_load_refuses(monkeypatch, source, elem, head_size, says):
    monkeypatch.setattr(launch, "current_device", lambda: 0)
    with pytest.raises(InputError, match=says) as caught:
        launch.load(source, elem, head_size)
    assert caught.value.where == source and caught.value.remedy


def test_no_gpu_names_the_remedy(monkeypatch):
    import cupy

    monkeypatch.setattr(cupy.cuda.runtime, "getDeviceCount", lambda: 0)
    with pytest.raises(DeviceError, match="device='cpu'"):
        launch.cupy_module()
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(DeviceError, match=r"gpt2cupy\[cuda12\]"):
        launch.cupy_module()
