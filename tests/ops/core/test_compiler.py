"""From sources to cubins without a GPU: the cache, its key, and what goes wrong."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest

from gpt2cupy.errors import CompileError, DeviceError, NoDeviceError
from gpt2cupy.ops.core import compiler, cuda_source, jobs, launch, variants
from gpt2cupy.ops.core.signature import ALIGNMENT
from gpt2cupy.record import ROOT

pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")

ARCH = "sm_90"
HALF = {"ELEM": "__half"}
WANTED = [
    (source, defines)
    for source, defines in variants.variants((64,), (256,))
    if defines.get("ELEM", "__half") == "__half"
]
# Asks for every kernel in a fresh process; whoever compiles there stops with an error.
_SECOND = """
from gpt2cupy.ops.core import compiler, variants
import gpt2cupy.ops.core.compiler as module
def refuse(*arguments): raise AssertionError("compiled again")
module.compile_source = refuse
every = variants.variants((64,), (256,))
wanted = [(s, d) for s, d in every if d.get("ELEM", "__half") == "__half"]
print(sum(compiler.cubin(s, d, "sm_90").stat().st_size > 0 for s, d in wanted))
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty kernel cache of this test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(folder))
    compiler._process_dir.cache_clear()
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
    shutil.copytree(cuda_source.source_dir(), copy)
    monkeypatch.setattr(cuda_source, "source_dir", lambda: copy)
    forget()
    yield copy
    forget()


def forget():
    """Read the sources again."""
    for cached in (cuda_source.source_closure, cuda_source.source_digests, cuda_source.macros):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("source", "macros"),
    [
        ("norm.cu", ("ELEM",)),
        ("sampling.cu", ()),
        ("linear.cu", ("ELEM",)),  # K is a parameter there
        ("skinny.cu", ("ELEM", "K")),
        ("attention_decode.cu", ("ELEM", "HS")),
        ("decode_step.cu", ("ELEM", "HS", "K", "BATCH")),
    ],
)
def test_a_source_says_its_macros(source, macros):
    assert cuda_source.macros(source) == macros


def test_a_new_source_is_compiled_without_a_table(sources):
    (sources / "toy.cu").write_text('#include "common.cuh"\n// K\n__device__ elem_t one;\n')
    assert [d["ELEM"] for s, d in variants.variants() if s == "toy.cu"] == [
        *compiler.ELEMENT_TYPES.values()
    ]


def test_tensor_cores_take_no_float():
    with_float = {s for s, d in variants.variants() if d.get("ELEM") == "float"}
    assert "skinny.cu" not in with_float and {"norm.cu", "linear_fixed.cu"} <= with_float


@pytest.mark.parametrize("source", cuda_source.sources())
def test_every_kernel_compiles_and_has_its_entries(source):
    half = np.dtype(np.float16)
    kernels = [kernel for kernel in every_kernel() if kernel.source == source]
    large = ("skinny_one", "skinny_norm")  # of large models alone
    asked = [
        (kernel, kernel.defines(half, 64, 1280 if kernel.entry.startswith(large) else 256))
        for kernel in kernels
    ]
    every = [*variants.variants((64,), (256, 1280))]
    assert all((source, defines) in every for _, defines in asked)
    cubins = [compiler.request(source, defines, ARCH) for _, defines in asked]
    for kernel, cubin in zip(kernels, cubins, strict=True):
        data = cubin.result().read_bytes()
        assert data[:4] == b"\x7fELF" and f".text.{kernel.entry}\0".encode() in data, kernel.entry


def every_kernel() -> list[launch.Kernel]:
    """Every Kernel that a module of ops declares."""
    # Some modules share their name with a function of ops: ask for them by their full name.
    names = ("cached_attention", "gpt2.embedding", "layout", "norm", "linear_kernels")
    names += ("quantized", "sampling", "gpt2.step")
    names += ("activation", "attention", "lookup", "norm_backward", "rope", "softmax")
    names += ("decode_attention", "drafts", "slots")
    names += ("linear_split",)
    modules = [importlib.import_module(f"gpt2cupy.ops.{name}") for name in names]
    values = [value for module in modules for value in vars(module).values()]
    values += [kernel for value in values if isinstance(value, dict) for kernel in value.values()]
    found = [value for value in values if isinstance(value, launch.Kernel)]
    assert {kernel.source for kernel in found} == set(cuda_source.sources())
    return found


def test_no_vector_asks_for_more_alignment_than_launch_checks(sources):
    """Newer chips have accesses of 32 bytes: eight floats aligned to 32 would fault on them."""
    checks = [
        f'static_assert(alignof(Vec<{elem}, {n}>) == {min(n * size, ALIGNMENT)}, "{elem} {n}");'
        for elem, size in (("float", 4), ("__half", 2), ("__nv_bfloat16", 2))
        for n in (1, 2, 4, 8, 16)
    ]
    (sources / "probe.cu").write_text('#include "common.cuh"\n' + "\n".join(checks))
    compiler.compile_source("probe.cu", ["-arch=sm_90", "-std=c++17"])


def test_a_second_process_compiles_nothing(cache, fake):
    for source, defines in WANTED:
        compiler.cubin(source, defines, ARCH)
    assert len(fake) == len(WANTED)
    second = subprocess.run(
        [sys.executable, "-c", _SECOND],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"GPT2CUPY_CACHE_DIR": str(cache)},
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
    include = sources / "epilogue.cuh"
    include.write_text(include.read_text() + "// a comment\n")
    forget()
    assert {s: compiler.cubin(s, HALF, ARCH) for s in before} == before
    include.write_text(include.read_text() + "constexpr int CHANGED = 1;\n")
    forget()
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


def test_a_cache_out_of_reach_warns_and_works(cache, fake, monkeypatch):
    real = os.stat

    def stat(path, *args, **kwargs):
        if str(path).startswith(str(cache)):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    cache.write_text("in the way")
    monkeypatch.setattr(os, "stat", stat)
    with pytest.warns(RuntimeWarning, match="GPT2CUPY_CACHE_DIR"):
        assert compiler.cubin("norm.cu", HALF, ARCH).is_file()


def test_no_place_at_all_for_kernels(tmp_path, fake, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(compiler.tempfile, "tempdir", str(tmp_path / "file" / "tmp"))
    compiler._process_dir.cache_clear()
    with (
        pytest.warns(RuntimeWarning, match="cannot be kept"),
        pytest.raises(CompileError, match="no place") as caught,
    ):
        compiler.cubin("norm.cu", HALF, ARCH)
    assert "TMPDIR" in caught.value.remedy


def test_a_filled_cache_needs_no_other_folder(cache, fake, monkeypatch):
    path = compiler.cubin("norm.cu", HALF, ARCH)
    compiler._process_dir.cache_clear()
    monkeypatch.setattr(compiler.tempfile, "tempdir", "/no/such/folder")
    assert compiler.cubin("norm.cu", HALF, ARCH) == path


def test_threads_compile_a_kernel_once(cache, fake, monkeypatch):
    slow, barrier = compiler.compile_source, threading.Barrier(4)

    def compile_source(source, options):
        time.sleep(0.1)
        return slow(source, options)

    monkeypatch.setattr(compiler, "compile_source", compile_source)

    def ask():
        barrier.wait(60)
        compiler.cubin("norm.cu", HALF, ARCH)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(fake) == 1


def test_different_kernels_are_compiled_side_by_side(cache, fake, monkeypatch):
    # Each waits until the other is being compiled too.
    monkeypatch.setattr(jobs, "threads", lambda: 2)
    monkeypatch.setattr(compiler._jobs, "_pool", None)
    both, quick = threading.Barrier(2), compiler.compile_source

    def compile_source(source, options):
        both.wait(60)
        return quick(source, options)

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    asked = [compiler.request(source, HALF, ARCH) for source in ("norm.cu", "embedding.cu")]
    assert {cubin.result(60).read_bytes() for cubin in asked} == {
        b"cubin of norm.cu",
        b"cubin of embedding.cu",
    }


def test_no_thread_is_left_when_all_is_compiled(cache, fake):
    for source in ("norm.cu", "embedding.cu"):
        compiler.request(source, HALF, ARCH).result(60)
    deadline = time.monotonic() + 60

    def left():
        return [each for each in threading.enumerate() if each.name.startswith("gpt2cupy-nvrtc")]

    while left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left() == []


def test_a_failure_reaches_all_who_wait_and_leaves_no_lock(cache, fake, monkeypatch):
    quick, asked = compiler.compile_source, threading.Event()

    def refuse(source, options):
        asked.wait(60)
        raise CompileError("refused", where=source, remedy="none")

    monkeypatch.setattr(compiler, "compile_source", refuse)
    waiting = [compiler.request("norm.cu", HALF, ARCH) for _ in range(2)]
    asked.set()
    for cubin in waiting:
        with pytest.raises(CompileError, match="refused"):
            cubin.result(60)
    monkeypatch.setattr(compiler, "compile_source", quick)
    assert compiler.cubin("norm.cu", HALF, ARCH).is_file(), "it is tried again"


def test_threads_that_cannot_keep_kernels_share_one_folder_and_warn_once(
    tmp_path, fake, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    compiler._process_dir.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        asked = [compiler.request(source, HALF, ARCH) for source in cuda_source.sources()]
        paths = [cubin.result(60) for cubin in asked]
    assert len(said) == 1 and "GPT2CUPY_CACHE_DIR" in str(said[0].message)
    assert len({path.parent for path in paths}) == 1 and all(path.is_file() for path in paths)


@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_compiles_for_itself(cache, fake, monkeypatch):
    """What its parent has under way will never end in the child."""
    started, go, quick = threading.Event(), threading.Event(), compiler.compile_source

    def compile_source(source, options):
        started.set()
        go.wait(60)
        return quick(source, options)

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    parents = compiler.request("norm.cu", HALF, ARCH)
    assert started.wait(60)
    child = os.fork()
    if not child:
        done = False
        try:
            monkeypatch.setattr(compiler, "compile_source", quick)
            done = compiler.request("norm.cu", HALF, ARCH).result(30).is_file()
        finally:
            os._exit(0 if done else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert not parents.done()
    go.set()
    assert parents.result(60).is_file()


def test_who_watches_is_told_how_many_are_compiled(cache, fake):
    told = []
    with compiler.watched(lambda *counts: told.append(counts)):
        asked = [compiler.request(source, HALF, ARCH) for source in ("norm.cu", "embedding.cu")]
        for cubin in asked:
            cubin.result(60)
        while told[-1][0] != told[-1][1]:  # told by the thread that compiled
            time.sleep(0.01)
        compiler.cubin("norm.cu", HALF, ARCH)
    compiler.cubin("layout.cu", HALF, ARCH)
    assert sorted(told, key=sum)[-1] in [(1, 1), (2, 2)] and len(told) == 4
    assert all(ended <= started for ended, started in told)


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
    version = ".".join(map(str, compiler.nvrtc_version()))
    with pytest.raises(CompileError, match=f"NVRTC {version} cannot") as caught:
        compiler.cubin("embedding.cu", HALF, "sm_12345")
    assert "sm_12345" in caught.value.what and "If sm_12345 is a newer chip" in caught.value.remedy
    assert "gpt2cupy[cuda13]" in caught.value.remedy and " sm_90," in caught.value.remedy
    assert isinstance(caught.value, DeviceError)


@pytest.mark.parametrize(
    "arch, says",
    [
        ("sm_120", "sm_120 needs NVRTC 12.8 or newer: install gpt2cupy[cuda13], or gpt2cupy[cuda1"),
        ("sm_121", "sm_121 needs NVRTC 12.9 or newer"),
        ("sm_110", "sm_110 needs NVRTC 13.0 or newer: install gpt2cupy[cuda13], with"),
        ("sm_90", "another option is wrong"),
        ("sm_90a", "another option is wrong"),
        ("compute_75", "another option is wrong"),
    ],
)
def test_an_nvrtc_older_than_the_chip_names_the_version_that_knows_it(arch, says):
    older = SimpleNamespace(getSupportedArchs=lambda: (75, 80, 86, 89, 90))
    assert says in compiler._newer_nvrtc(older, [f"-arch={arch}", "-std=c++17"])


def test_an_nvrtc_without_a_chips_own_instructions_is_told_the_chip():
    older = SimpleNamespace(getSupportedArchs=lambda: (75, 80, 86))
    assert compiler._newer_nvrtc(older, ["-arch=sm_90a"]).startswith("If sm_90 is a newer chip")


def test_a_chip_with_instructions_of_its_own_is_compiled_for_by_its_own_name(cache, monkeypatch):
    seen = []
    monkeypatch.setattr(compiler, "compile_source", lambda *given: seen.append(given) or b"cubin")
    for arch in ("sm_80", "sm_90", "sm_120"):
        compiler.cubin("linear_rows.cu", HALF, arch)
    assert [options[0] for _, options in seen] == ["-arch=sm_80", "-arch=sm_90a", "-arch=sm_120"]


def test_the_chips_that_need_a_newer_nvrtc_are_those_of_this_one_and_its_version():
    known = {f"sm_{number}" for number in compiler.nvrtc().getSupportedArchs()}
    version = ".".join(map(str, compiler.nvrtc_version()))
    needed = {arch for arch, since in compiler.NEWER_CHIPS.items() if version >= since}
    assert needed <= known and known.isdisjoint(compiler.NEWER_CHIPS.keys() - needed)


def test_a_missing_nvrtc_names_the_wheel(cache, monkeypatch):
    from cupy.cuda import nvrtc

    def fail():
        raise RuntimeError("CuPy failed to load libnvrtc.so.12: OSError: no such file")

    monkeypatch.setattr(nvrtc, "getVersion", fail)
    with pytest.raises(CompileError, match=r"libnvrtc\.so\.12") as caught:
        compiler.cubin("norm.cu", HALF, ARCH)
    assert caught.value.where == "libnvrtc" and "nvidia-cuda-nvrtc-cu12" in caught.value.remedy
    monkeypatch.undo()
    assert compiler.nvrtc_version() > (11, 0)


@pytest.mark.parametrize("found", [None, "/", ImportError], ids=str)
def test_missing_headers_name_the_wheel(cache, monkeypatch, found):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    compiler._cuda_includes.cache_clear()
    with monkeypatch.context() as patch:
        if found is ImportError:
            patch.setitem(sys.modules, "cuda.pathfinder", None)
        else:
            patch.setattr(pathfinder, "find_nvidia_header_directory", lambda name: found)
        with pytest.raises(CompileError, match="headers") as caught:
            compiler.cubin("embedding.cu", HALF, ARCH)
    assert caught.value.where == "cuda_fp16.h"
    assert "nvidia-cuda-runtime-cu12" in caught.value.remedy
    assert not cache.exists()
    assert compiler.cubin("embedding.cu", HALF, ARCH).is_file()


def test_nvrtc_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(NoDeviceError, match="CuPy is not installed"):
        compiler.nvrtc()


def test_the_cache_folder(monkeypatch):
    monkeypatch.setenv("GPT2CUPY_CACHE_DIR", "/a")
    assert str(compiler.cache_dir()) == "/a"
    monkeypatch.delenv("GPT2CUPY_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert str(compiler.cache_dir()) == "/b/gpt2cupy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert str(compiler.cache_dir()) == "/c/.cache/gpt2cupy"

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(compiler.Path, "home", homeless)
    with pytest.raises(CompileError, match="no home folder") as caught:
        compiler.cache_dir()
    assert "GPT2CUPY_CACHE_DIR" in caught.value.remedy
