"""Registers, spills and shared memory read from cubins, and the blocks that fit on an SM."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt2cupy.errors import CompileError
from gpt2cupy.inspect import kernel_report
from gpt2cupy.inspect.occupancy import LIMITS, REGISTERS, WARP, blocks_per_sm, read_cubin
from gpt2cupy.ops import linear_kernels
from gpt2cupy.ops.core import compiler, cuda_source, registry
from gpt2cupy.quantize import QuantizedMatrix

# Needs more registers than it may have, and an array that cannot stay in registers.
SPILLING = """
extern "C" __global__ void __launch_bounds__(64, 2) spills(float* x, int n) {
  float values[96];
  for (int i = 0; i < 96; ++i) values[i] = x[i * n + threadIdx.x];
  for (int round = 0; round < n; ++round)
    for (int i = 0; i < 96; ++i) values[i] = values[(i * 7 + n) % 96] * x[i] + values[i];
  for (int i = 0; i < 96; ++i) x[i * n + threadIdx.x] = values[i];
}
extern "C" __global__ void __launch_bounds__(32 * 4) shares(float* x) {
  __shared__ float tile[300];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = tile[127 - threadIdx.x];
}
__device__ __noinline__ float apart(float x, int n) { return n ? apart(x * x, n - 1) : x + 1; }
extern "C" __global__ void plain(float* x) { x[threadIdx.x] += 1; }
extern "C" __global__ void calls(float* x, int n) { x[threadIdx.x] = apart(x[0], n); }
"""


def compiled(code: str, name: str, arch: str, *options: str) -> tuple[bytes, str]:
    """The cubin of a source, and what the compiler says about it."""
    binding = compiler.nvrtc()
    texts = dict(cuda_source.source_closure(name)) if name in cuda_source.sources() else {}
    texts.pop(name, None)
    program = binding.createProgram(
        code, name, compiler._encoded(texts.values()), compiler._encoded(texts)
    )
    options = (f"-arch={arch}", "-std=c++17", "--ptxas-options=-v", *options)
    try:
        binding.compileProgram(program, (*options, *compiler._cuda_includes()))
        return binding.getCUBIN(program), binding.getProgramLog(program)
    finally:
        binding.destroyProgram(program)


def told(log: str) -> dict[str, tuple[int, int, int]]:
    """(registers, stack frame, shared memory) of each entry in the compiler's words."""
    found = {}
    for part in log.split("Compiling entry function ")[1:]:
        name = re.match(r"'(\w+)'", part)
        frame = re.search(r"(\d+) bytes stack frame", part)
        registers = re.search(r"Used (\d+) registers", part)
        shared = re.search(r"(\d+) bytes smem", part)
        found[name[1]] = (int(registers[1]), int(frame[1]), int(shared[1]) if shared else 0)
    return found


def read(tmp_path, cubin: bytes) -> dict[str, tuple[int, int, int]]:
    (tmp_path / "x.cubin").write_bytes(cubin)
    return {
        entry: (found.registers, found.local_bytes, found.shared_bytes)
        for entry, found in read_cubin(tmp_path / "x.cubin").items()
    }


@pytest.mark.parametrize("source", cuda_source.sources())
@pytest.mark.parametrize("arch", ["sm_75", "sm_90", "sm_120"])
def test_cubins_are_read_as_the_compiler_says(source, arch, tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    code = dict(cuda_source.source_closure(source))[source]
    values = {"ELEM": "__half", "HS": "64", "K": "256", "BATCH": "1"}
    macros = [f"-D{macro}={values[macro]}" for macro in cuda_source.macros(source)]
    cubin, log = compiled(code, source, compiler.OWN_FEATURES.get(arch, arch), *macros)
    assert read(tmp_path, cubin) == told(log)
    # What sm_75 has not, and what sm_90 alone has, is left out of a source.
    if arch == "sm_90" or (arch != "sm_75" and "__CUDA_ARCH_FEAT_SM90_ALL" not in code):
        assert told(log)


@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_90", "sm_120"])
def test_spills_shared_memory_and_bounds(arch, tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    cubin, log = compiled(SPILLING, "spilling.cu", arch)
    found = read(tmp_path, cubin)
    assert found == told(log)
    assert found["spills"][1] > 0 == found["plain"][1]
    assert found["shares"][2] == 1200 and found["plain"][2] == 0
    bounds = {entry: each.max_threads for entry, each in read_cubin(tmp_path / "x.cubin").items()}
    assert bounds == {"spills": 64, "shares": 128, "plain": None, "calls": None}


def test_a_broken_cubin_is_our_error(tmp_path):
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    whole, _ = compiled(SPILLING, "spilling.cu", "sm_90")
    path = tmp_path / "x.cubin"
    broken = [b"", b"\x7fELF", whole[:60], whole[: len(whole) // 2], b"MZ" + whole[2:]]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(CompileError, match=r"x\.cubin") as caught:
            read_cubin(path)
        assert caught.value.remedy
    with pytest.raises(CompileError):
        read_cubin(tmp_path / "missing.cubin")


def test_every_architecture_has_limits():
    assert set(LIMITS) == set(compiler.ARCHITECTURES)


@pytest.mark.parametrize(
    "arch, threads, registers, shared, blocks",
    [
        # Each line is held back by something else: warps, blocks, registers, shared memory.
        # Those of sm_90 are what the driver of an H200 answered.
        ("sm_90", 256, 32, 0, 8),
        ("sm_90", 32, 18, 0, 32),
        ("sm_90", 96, 18, 0, 21),
        ("sm_90", 128, 36, 0, 12),  # 40 registers a thread, 1280 a warp: 12 warps in a quarter
        ("sm_90", 1024, 36, 0, 1),
        ("sm_90", 96, 166, 64, 4),
        ("sm_90", 256, 62, 41600, 4),
        ("sm_90", 128, 62, 41600, 5),
        ("sm_90", 32, 83, 4224, 20),
        ("sm_75", 32, 16, 32 << 10, 2),  # nothing reserved
        ("sm_80", 32, 16, 32 << 10, 4),  # 33 KB each of 164
        ("sm_86", 1024, 32, 0, 1),  # 48 warps
        ("sm_89", 32, 16, 0, 24),
        ("sm_75", 1024, 65, 0, 0),  # cannot be launched
    ],
)
def test_blocks_per_sm(arch, threads, registers, shared, blocks):
    assert blocks_per_sm(arch, threads, registers, shared) == blocks


@given(
    st.sampled_from(sorted(LIMITS)),
    st.integers(1, 1024),
    st.integers(0, 255),
    st.integers(0, 64 << 10),
)
def test_blocks_per_sm_keep_within_the_limits(arch, threads, registers, shared):
    limits, blocks = LIMITS[arch], blocks_per_sm(arch, threads, registers, shared)
    warps = -(-threads // WARP)
    assert 0 <= blocks <= limits.blocks and blocks * warps <= limits.warps
    assert blocks * warps * WARP * registers <= REGISTERS
    assert blocks * (shared + limits.reserved_bytes) <= limits.shared_bytes
    # What takes more never fits more often.
    assert blocks_per_sm(arch, threads, registers + 8, shared) <= blocks
    assert blocks_per_sm(arch, threads, registers, shared + 1024) <= blocks


# -- the table of blocks -------------------------------------------------------------------------


def test_no_block_is_larger_than_the_cubin_says(monkeypatch):
    """What ops launches with is what __launch_bounds__ says, so that a report is true."""
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    from gpt2cupy.ops import layout
    from gpt2cupy.ops.gpt2.embedding import embedding, last_rows
    from gpt2cupy.ops.linear import bias_act, gemv
    from gpt2cupy.ops.norm import add_layer_norm, layer_norm
    from gpt2cupy.ops.quantized import dequantize, quantize

    seen: dict[tuple[str, str], int] = {}

    def launch(kernel, grid, block, args, **options):
        seen[kernel.source, kernel.entry] = int(np.prod(block))

    class Array(np.ndarray):
        _c_contiguous = True

    def ones(shape, dtype):
        return np.ones(shape, dtype).view(Array)

    # The launcher is replaced, so NumPy's arrays do for the GPU's.
    for function in (embedding, bias_act, gemv, layer_norm, quantize):
        inside = function.__wrapped__.__globals__
        monkeypatch.setitem(inside, "launch", launch)
        if "device_empty" in inside:
            monkeypatch.setitem(inside, "device_empty", np.empty)
    for function in (quantize, layer_norm):
        monkeypatch.setitem(function.__wrapped__.__globals__, "sm_count", lambda: 132)
    monkeypatch.setattr(registry, "_device_types", {Array, np.ndarray, QuantizedMatrix})
    half, single = np.float16, np.float32
    x, weight, bias = ones((2, 768), single), ones(768, half), ones(768, half)
    out = ones((2, 768), half)
    layer_norm(x, weight, bias, out=out)
    add_layer_norm(out, x, weight, bias, out=(out, x))
    ids = np.zeros(2, np.int32)
    embedding(ids, ids, ones((5, 768), half), ones((5, 768), half), out=x)
    last_rows(x, out, np.arange(3, dtype=np.int32), out=(x, out))
    # A size that the fused kernels cannot take.
    gemv(ones((1, 59), half), ones((8, 59), half), out=np.empty((1, 8), half))
    bias_act(out, bias, out=out)
    matrix = quantize(x)
    dequantize(matrix, half)
    embedding(ids, ids, matrix, ones((5, 768), half), out=x)
    c = cuda_source.constants("layout.cu")
    for kernel in (*layout.TRANSPOSE.values(), *layout.CONVERT.values()):
        seen[kernel.source, kernel.entry] = c["TILE"] * c["TILE_ROWS"]
    assert len(seen) == 9 + 2 * 3
    for source in {source for source, _ in seen}:
        found = read_cubin(compiler.cubin(source, {"ELEM": "__half"}, "sm_90"))
        for entry in (entry for at, entry in seen if at == source):
            # How many threads share a row of a norm follows from the row; others have one size.
            most = found[entry].max_threads
            assert seen[source, entry] == most or (
                source in ("norm.cu", "add_norm.cu") and seen[source, entry] < most
            )


@pytest.mark.parametrize("k", [8, 768, 1024, 1152, 1280, 1312, 1600, 2048, 3200, 8000])
def test_skinny_has_the_warps_it_is_launched_with(k):
    """Too few would leave out a part of each sum, and no error would say so."""
    pytest.importorskip("cupy", reason="compiling needs CuPy's binding of NVRTC")
    found = read_cubin(compiler.cubin("skinny.cu", {"ELEM": "__half", "K": str(k)}, "sm_90"))
    for name, entry in found.items():
        tiles = 2 if name.startswith(("skinny_add_t2", "skinny_norm")) else 1
        c = cuda_source.constants("skinny.cu", K=k, TILES=tiles)
        assert entry.max_threads == WARP * c["WARPS"], name
    c = cuda_source.constants("skinny.cu", K=k, TILES=2)
    evenly = k % (c["SPAN"] * c["WARPS"]) == 0
    most = linear_kernels.longest_norm()
    one = c["ONE_ROW_ABOVE"] < k <= most or k > c["ONE_ROW_AGAIN_ABOVE"]
    assert ("skinny_one" in found) == ("skinny_one_f32" in found) == one
    assert ("skinny_norm" in found) == (one and k <= most and evenly)
    assert ("skinny_add_t2" in found) == (k <= linear_kernels.longest_norm())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_driver_agrees(dtype):
    asked = kernel_report.report("shakespeare", dtype, "cuda", None)
    arch = asked[0]["arch"]
    assert asked == kernel_report.report("shakespeare", dtype, "cuda", arch)
    assert all(row["registers"] for row in asked)
