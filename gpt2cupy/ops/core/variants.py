"""What is compiled ahead of time: sources with their macros, and which of them a chip launches."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .compiler import ELEMENT_TYPES
from .cuda_source import constants, macros, source_closure, sources

# Of GPT-2, and those that ops are tuned for; others compile on demand.
GPT2_HEAD_SIZES = (64,)
FAST_HEAD_SIZES = (32, 64, 80, 96, 128)
# n_embd and inner size of GPT-2's four sizes and of the embedded model; others compile on demand.
FAST_INNER_SIZES = (256, 768, 1024, 1280, 1600, 3072, 4096, 5120, 6400)

# decode_step.cu is compiled for each number of rows: a run needs one.
STEP_ROWS = (1, 2, 4)

# What no GPT-2 launches: only a caller of gpt2cupy.ops does.
OPS_ALONE = {
    "add_norm.cu", "attention.cu", "attention_mma.cu", "attention_split.cu", "attention_wgmma.cu",
    "decode_attention.cu", "decode_attention_merge.cu", "decode_attention_mma.cu", "elementwise.cu",
    "linear_split.cu", "norm_backward.cu", "rms_norm.cu", "rope.cu", "sample_logits.cu",
    "softmax_rows.cu",
}  # fmt: skip


# A second and more to compile each, on cores where most take a third: they go first, so that no
# core is left with one of them at the end.
SLOWEST = {
    "add_norm.cu", "attention_wgmma.cu", "decode_attention.cu", "decode_step.cu", "linear_rows.cu",
    "norm.cu", "rms_norm.cu", "softmax_rows.cu",
}  # fmt: skip


def variants(
    head_sizes: tuple[int, ...] = FAST_HEAD_SIZES, inner_sizes: tuple[int, ...] = FAST_INNER_SIZES
) -> Iterator[tuple[str, dict[str, str]]]:
    """Every (source, macros) pair of these sizes that some chip may launch."""
    choices = {
        "ELEM": tuple(ELEMENT_TYPES.values()),
        "HS": tuple(map(str, head_sizes)),
        "K": tuple(map(str, inner_sizes)),
        "BATCH": tuple(map(str, STEP_ROWS)),
    }
    for source in sources():
        needed = macros(source)
        for values in itertools.product(*(choices[macro] for macro in needed)):
            defines = dict(zip(needed, values, strict=True))
            if "float" in values and on_tensor_cores(source):
                continue
            if source == "decode_step.cu" and not takes_step(defines):
                continue
            yield source, defines


def takes_step(defines: Mapping[str, str]) -> bool:
    """Whether decode_step.cu has entries for these sizes; K is n_embd there."""
    c = constants("decode_step.cu")
    channels, head_size = int(defines["K"]), int(defines["HS"])
    fits = c["STEP_FEWEST_CHANNELS"] <= channels <= c["STEP_MOST_CHANNELS"]
    return head_size == c["STEP_HEAD_SIZE"] and fits and not channels % head_size


def launched(source: str, defines: Mapping[str, str], arch: str) -> bool:
    """Whether a chip ever launches a variant; what it does not is left to an older or newer one.

    As the ops choose: the tests compare with what they launch.
    """
    chip = int(re.findall(r"\d+", arch)[0])
    mma, clusters, wgmma = chip >= 80, chip >= 90, chip == 90
    narrow = defines.get("ELEM") in ("__half", "__nv_bfloat16")
    tiles = narrow and int(defines.get("HS", 64)) % 16 == 0
    match source:
        case "attention.cu":
            return not mma
        case "attention_mma.cu":
            return mma and not wgmma
        case "attention_split.cu" | "attention_wgmma.cu":
            return wgmma
        case "attention_decode.cu" | "attention_prefill.cu":
            return not (mma and tiles)
        case "attention_decode_mma.cu" | "attention_decode_rows.cu" | "attention_prefill_mma.cu":
            return mma and tiles
        case "decode_attention.cu":
            return not (mma and narrow)
        case "decode_step.cu":
            return clusters
        case "linear_split.cu":
            return chip in (80, 90)
        case "norm_gemv.cu":
            longest = constants("skinny.cu")["ONE_ROW_AGAIN_ABOVE"]
            return not (mma and narrow and int(defines["K"]) > longest)
    return mma or not on_tensor_cores(source)


def in_order(jobs: Iterable[tuple[str, dict[str, str], str]]) -> list[Any]:
    """(source, macros, architecture), those that take longest first."""

    def length(source: str) -> int:
        return sum(len(text) for _, text in source_closure(source))

    return sorted(jobs, key=lambda job: (job[0] not in SLOWEST, -length(job[0])))


def on_tensor_cores(source: str) -> bool:
    """Whether a source multiplies on tensor cores, and does not split float for that."""
    names = {name for name, _ in source_closure(source)}
    return "mma.cuh" in names and "split.cuh" not in names
