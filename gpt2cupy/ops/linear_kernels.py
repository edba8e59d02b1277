"""The kernels behind linear.py: which of them takes a GEMV or GEMM, and with what grid."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from .core.cuda_source import constants
from .core.device import has_clusters, has_mma, shared_limit, sm_count
from .core.launch import Kernel, launch

Array = Any

THREADS = 256  # of a block of bias_act
WARP = 32
_BLOCKS_PER_SM = 4  # enough warps to keep the memory busy; blocks then take several iterations
_MOST_ROWS, _MOST_OUTPUTS = 256, 8192  # of linear_rows.cu; with more the library is faster
_MOST_FIXED_ROWS = 16  # of linear_fixed.cu, which reads the weights once for each eight
_FEW_STAGES = 4  # where a multiprocessor has several blocks
_LARGEST_SPREAD = 5_000_000  # bytes of weights whose blocks go to one multiprocessor each
_FULL = 0.5  # share of the multiprocessors that must have a block of more than a tile of rows
_LIBRARY_BYTES = 32 << 20  # of weights, for few rows
_STATIC = 1024  # bytes of its shared memory beside stages and sums, at most
LONGEST = 8192  # longest row that fits their registers


def entries(source: str, name: str, signature: str, **options: Any) -> dict[bool, Kernel]:
    """The entry whose output is ELEM, and the one whose output is float32."""
    return {
        False: Kernel(source, name, signature.replace("OUT", "ELEM"), **options),
        True: Kernel(source, f"{name}_f32", signature.replace("OUT", "float32"), **options),
    }


_GEMV = (
    "x: ELEM[1,K], weight: ELEM[M,K], bias: OUT[M]?, residual: OUT[1,M]?, out: OUT[1,M]~, "
    "activation: int, M"
)
_NORM_GEMV = (
    "x: float32[1,K], norm_weight: ELEM[K], norm_bias: ELEM[K], weight: ELEM[M,K], bias: OUT[M]?, "
    "out: OUT[1,M]!, eps: float, activation: int, M"
)
_NORM_GEMV_ONCE = (
    "x: float32[1,K], norm_weight: ELEM[K], weight: ELEM[M,K], shift: float32[M], out: OUT[1,M]!, "
    "eps: float, activation: int, M"
)
GEMV_ADD = entries("norm_gemv.cu", "gemv_add", _GEMV, overlaps=True)
NORM_GEMV = entries("norm_gemv.cu", "norm_gemv", _NORM_GEMV, overlaps=True)
GEMV_ADD_ONCE = entries("norm_gemv.cu", "gemv_add_once", _GEMV, overlaps=True)
NORM_GEMV_ONCE = entries("norm_gemv.cu", "norm_gemv_once", _NORM_GEMV_ONCE, overlaps=True)
_SKINNY = _GEMV.replace("[1,", "[N,").replace("int, M", "int, N, M")
# By the number of tiles of a block, and whether the output is float32.
SKINNY_ADD = {
    (tiles, wide): kernel
    for tiles in (1, 2)
    for wide, kernel in entries("skinny.cu", f"skinny_add_t{tiles}", _SKINNY, overlaps=True).items()
}
SKINNY_ONE = entries("skinny.cu", "skinny_one", _SKINNY, overlaps=True)
SKINNY_NORM = entries("skinny.cu", "skinny_norm", _NORM_GEMV, overlaps=True)
# By the number of blocks that share a tile, and whether the output is float32.
LINEAR_ROWS = {
    (blocks, wide): kernel
    for blocks in (1, 2, 4, 8)
    for wide, kernel in entries(
        "linear_rows.cu", f"linear_rows_c{blocks}", _SKINNY + ", K, stages: int", overlaps=True
    ).items()
}
LINEAR_FIXED = entries("linear_fixed.cu", "linear_fixed", _SKINNY + ", K", overlaps=True)
# Plainer versions for readers and tests; gemv_scalar also takes the sizes that gemv_add cannot.
GEMV = entries("linear.cu", "gemv", _GEMV + ", K")
GEMV_SCALAR = entries("linear.cu", "gemv_scalar", _GEMV + ", K")
GEMV_NAIVE = entries("linear.cu", "gemv_naive", _GEMV + ", K")
BIAS_ACT = entries(
    "linear.cu",
    "bias_act",
    "x: OUT[N,M], bias: OUT[M]?, residual: OUT[N,M]?, out: OUT[N,M]~, activation: int, N, M",
)


def longest_norm() -> int:
    """The longest row that the kernels of one row normalise."""
    return constants("norm_gemv.cu")["LONGEST_NORM"]


def longest_once() -> int:
    """The longest row that norm_gemv_once takes; with a longer one skinny.cu is faster."""
    return constants("norm_gemv.cu")["LONGEST_ONCE"]


def fused_block(weight: Array, backend: str) -> tuple[int, int] | None:
    """(outputs, warps) of a block of norm_gemv.cu, which fuses what is around a GEMV.

    None for other backends, and for rows that cannot be read 16 bytes at a time.
    """
    if backend != "ours" or not _fits_vectors(weight):
        return None
    c = constants("norm_gemv.cu", K=weight.shape[1])
    return c["OUTPUTS"], c["WARPS"]


def _fits_vectors(weight: Array) -> bool:
    return weight.shape[1] * weight.dtype.itemsize % 16 == 0 and weight.shape[1] <= LONGEST


def launch_fused(
    kernel: Kernel, fused: tuple[int, int], weight: Array, args: tuple[Any, ...]
) -> None:
    outputs, warps = fused
    m, k = weight.shape
    blocks = min(-(-m // outputs), sm_count() * _BLOCKS_PER_SM)
    launch(kernel, (blocks,), (warps * WARP,), args, elem=weight.dtype, inner=k)


def takes_skinny(rows: int, weight: Array, backend: str) -> bool:
    """Whether skinny.cu is there for a GEMM of so many rows, and the fastest.

    One row: only with K from 1025 to 2048 or above 4096; elsewhere norm_gemv.cu is faster.
    """
    if backend != "ours" or weight.dtype == np.float32 or not _fits_vectors(weight):
        return False
    k, c = weight.shape[1], constants("skinny.cu")
    large = c["ONE_ROW_ABOVE"] < k <= longest_norm() or k > c["ONE_ROW_AGAIN_ABOVE"]
    return (large if rows == 1 else rows <= c["ROWS"]) and has_mma()


def launch_skinny(rows: int, weight: Array, args: tuple[Any, ...], wide: bool) -> None:
    """The GEMM of up to 16 rows; ``wide`` says that the output is float32."""
    m, k = weight.shape
    if rows == 1:
        _launch_tiles(SKINNY_ONE[wide], 1, weight, args)
        return
    # Two tiles share what is loaded of x; with fewer blocks than multiprocessors one is faster.
    two = k <= longest_norm() and m >= 2 * constants("skinny.cu")["TILE"] * sm_count()
    most = sm_count() * _BLOCKS_PER_SM
    _launch_tiles(SKINNY_ADD[1 + two, wide], 1 + two, weight, args, most)


def takes_skinny_norm(weight: Array, backend: str) -> bool:
    """Whether skinny.cu is there for a norm and the GEMV after it, and the fastest."""
    k, c = weight.shape[1], constants("skinny.cu", K=weight.shape[1], TILES=2)
    fits = k <= longest_norm() and k % (c["SPAN"] * c["WARPS"]) == 0
    return fits and _one_turn(weight, 2 * c["TILE"]) and takes_skinny(1, weight, backend)


def launch_skinny_norm(weight: Array, args: tuple[Any, ...], wide: bool) -> None:
    """A norm and the GEMV after it."""
    _launch_tiles(SKINNY_NORM[wide], 2, weight, args)


def _launch_tiles(
    kernel: Kernel, tiles: int, weight: Array, args: tuple[Any, ...], most: int | None = None
) -> None:
    m, k = weight.shape
    c = constants("skinny.cu", K=k, TILES=tiles)
    blocks = -(-m // (tiles * c["TILE"]))
    launch(
        kernel,
        (min(blocks, most or blocks),),
        (c["WARPS"] * WARP,),
        args,
        elem=weight.dtype,
        inner=k,
    )


def launch_gemv_add(
    fused: tuple[int, int], weight: Array, args: tuple[Any, ...], wide: bool
) -> None:
    """The GEMV; ``wide`` says that the output is float32."""
    once = _one_turn(weight, fused[0])
    launch_fused((GEMV_ADD_ONCE if once else GEMV_ADD)[wide], fused, weight, args)


def takes_norm_once(weight: Array, backend: str) -> bool:
    """Whether norm_gemv_once can make the product of one row after its norm."""
    fits = fused_block(weight, backend) is not None and weight.shape[1] <= longest_once()
    return fits and _one_turn(weight, _norm_once_block()[0])


def launch_norm_once(weight: Array, args: tuple[Any, ...], wide: bool) -> None:
    """A norm and the GEMV after it, given the GEMV's shift."""
    launch_fused(NORM_GEMV_ONCE[wide], _norm_once_block(), weight, args)


def _norm_once_block() -> tuple[int, int]:
    c = constants("norm_gemv.cu")
    return c["WARPS"] * c["ROWS_ONCE"], c["WARPS"]


def _one_turn(weight: Array, outputs: int) -> bool:
    """Whether the largest grid has a block for every ``outputs`` outputs."""
    return len(weight) <= sm_count() * _BLOCKS_PER_SM * outputs


def takes_library(rows: int, weight: Array) -> bool:
    """Whether cuBLASLt is faster than the kernels here for a GEMV or GEMM of few rows.

    So it is with weights that take longer to read than a launch, and for one row where it
    is longer than what norm_gemv.cu holds.
    """
    large = weight.dtype != np.float32 and weight.nbytes >= _LIBRARY_BYTES
    return large and (rows > 1 or weight.shape[1] > LONGEST)


def takes_linear_rows(rows: int, weight: Array, backend: str) -> bool:
    """Whether linear_rows.cu is there for a GEMM of so many rows, and faster than cuBLASLt."""
    few = rows <= _MOST_ROWS and len(weight) <= _MOST_OUTPUTS
    if backend != "ours" or not few or not _fits_rows(weight) or not has_clusters():
        return False
    if rows <= constants("linear_rows.cu")["ROWS"]:
        return True
    # More than a tile only where each block is alone, with its share of K under way at once, and
    # most multiprocessors have one.
    plan = _rows_plan(rows, weight)
    full = plan.tiles[0] * plan.tiles[1] * plan.split > _FULL * sm_count()
    return plan.spread and full and plan.split * plan.stages >= _chunks(weight)


def _fits_rows(weight: Array) -> bool:
    return weight.dtype != np.float32 and weight.shape[1] % 8 == 0


def _chunks(weight: Array) -> int:
    return -(-weight.shape[1] // constants("linear_rows.cu")["CHUNK"])


class _RowsPlan(NamedTuple):
    """How linear_rows.cu runs a GEMM."""

    tiles: tuple[int, int]  # along the outputs and the rows
    split: int  # blocks for each tile, which share K
    spread: bool  # whether each block has a multiprocessor for itself
    stages: int  # of a block's pipeline
    shared: int  # bytes


def _rows_plan(rows: int, weight: Array, *, invariant: bool = False) -> _RowsPlan:
    """Two blocks on one multiprocessor would take twice as long while others have none.

    So blocks are spread. But a GEMM with large weights waits for the memory, and with
    two more loads are in flight: with more than 5 MB of weights that is faster.
    """
    c = constants("linear_rows.cu")
    tiles = -(-len(weight) // c["OUTPUTS"]), -(-rows // c["ROWS"])
    spread = (
        not invariant and weight.nbytes <= _LARGEST_SPREAD and tiles[0] * tiles[1] <= sm_count()
    )
    # With batch_invariant K is split as for one row, however many there are.
    apart = tiles[0] * (1 if invariant else tiles[1])
    split = _rows_split(apart, _chunks(weight), sm_count() * (1 if spread else 2))
    sums = c["SUMS_BYTES"] * min(split, 2)
    fitting = (shared_limit() - sums - _STATIC) // c["STAGE_BYTES"]
    most = c["MOST_STAGES"] if spread else _FEW_STAGES
    stages = min(-(-_chunks(weight) // split), fitting, most)
    shared = stages * c["STAGE_BYTES"] + sums
    if spread:  # more than half of what there is
        shared = max(shared, shared_limit() // 2 + 1)
    return _RowsPlan(tiles, split, spread, stages, shared)


def _rows_split(tiles: int, chunks: int, room: int) -> int:
    """The shortest way through K with no more blocks than there is room for."""
    if not has_clusters():
        return 1
    usable = [s for s in (1, 2, 4, 8) if s == 1 or tiles * s <= room]
    return min(usable, key=lambda split: -(-chunks // split))


def launch_rows(
    x: Array, weight: Array, out: Array, args: tuple[Any, ...], *, invariant: bool = False
) -> None:
    """linear_rows.cu."""
    plan = _rows_plan(len(x), weight, invariant=invariant)
    grid = (plan.tiles[0] * plan.split, plan.tiles[1])
    kernel = LINEAR_ROWS[plan.split, out.dtype == np.float32]
    block = (constants("linear_rows.cu")["THREADS"],)
    launch(kernel, grid, block, (*args, plan.stages), elem=weight.dtype, shared=plan.shared)


def launch_invariant(x: Array, weight: Array, out: Array, args: tuple[Any, ...]) -> None:
    """One kernel and one order of every sum for any number of rows."""
    if _fits_rows(weight) and has_mma():
        launch_rows(x, weight, out, args, invariant=True)
    else:
        launch_fixed(x, weight, out, args)


def takes_fixed(rows: int, weight: Array, backend: str) -> bool:
    """Whether linear_fixed.cu is faster than cuBLASLt: float32, which has no other kernel of ours.

    Its sums are also in more parts: those of cuBLASLt for 16 rows had up to four times
    PyTorch's error beside a channel in the thousands.
    """
    few = 2 <= rows <= _MOST_FIXED_ROWS
    return few and backend == "ours" and weight.dtype == np.float32


def launch_fixed(x: Array, weight: Array, out: Array, args: tuple[Any, ...]) -> None:
    """A product whose sums have an order that K alone decides."""
    c = constants("linear_fixed.cu")
    grid = (-(-len(weight) // c["OUTPUTS"]), -(-len(x) // c["ROWS"]))
    kernel = LINEAR_FIXED[out.dtype == np.float32]
    launch(kernel, grid, (c["WARPS"] * WARP,), args, elem=weight.dtype)
