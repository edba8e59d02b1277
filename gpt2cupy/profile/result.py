"""From timelines to tables: components, kernels, the step as kernels and gaps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..ops.core.registry import Cost
from ..timing import Timing
from .components import COVERS, TABLES, Op
from .limits import Limits
from .timeline import Timeline

Row = dict[str, Any]


@dataclass
class Profile:
    """What was measured.

    Attributes
    ----------
    results : dict
        JSON: settings, device, tables, figures per token, kernels, gaps, limits.
    ops : list of Op
        The step's ops, in order.
    timeline : Timeline
        The finest one there is: CUPTI's, else that of the ops.
    error : Exception or None
        Why kernels could not be recorded, where that was asked for and failed.
    """

    results: dict[str, Any]
    ops: list[Op]
    timeline: Timeline
    error: Exception | None = None


def joined(runs: list[Timeline]) -> Timeline:
    """Several runs of one session as one timeline."""
    first = runs[0]
    return Timeline(
        np.concatenate([run.start for run in runs]),
        np.concatenate([run.end for run in runs]),
        first.owner,
        first.names,
        first.source,
        float(np.median([run.step_us for run in runs])),
    )


def component_tables(ops: list[Op], timeline: Timeline, layers: int) -> dict[str, list[Row]]:
    """The four tables, each row with average and total ms, count and share of its table.

    A norm inside a GEMV has no row of its own: the GEMV's row
    covers it.
    """
    busy = timeline.busy
    steps = len(busy)
    tables = {}
    for name, rows in TABLES.items():
        # The rows "blocks", "embeddings", ... come once a step, those inside a block L times.
        count = steps * (1 if name == "model" else layers)
        rows = tuple(row for row in rows if any(op.within(row) for op in ops))
        totals = [float(busy[:, _columns(ops, timeline, row)].sum()) / 1e3 for row in rows]
        tables[name] = [
            {
                "component": row,
                "avg_ms": total / count,
                "total_ms": total,
                "count": count,
                "percent": 100 * total / sum(totals),
                "covers": ", ".join(_covers(ops, row)),
                "launches": _launches(ops, row),
            }
            for row, total in zip(rows, totals, strict=True)
        ]
    return tables


def _covers(ops: list[Op], component: str) -> list[str]:
    """What a row stands for: norms that a kernel in it makes, and its own steps."""
    if component == "blocks":
        return []
    inside = TABLES.get(component, ())
    mine = [op for op in ops if op.within(component)]
    fused = [name for op in mine for name in op.fused if name not in inside]
    own = COVERS.get(component, (component,) if fused else ())
    return [*dict.fromkeys([*fused, *own])]


def _columns(ops: list[Op], timeline: Timeline, component: str) -> list[int]:
    return [n for n, (op, _) in enumerate(timeline.owner) if ops[op].within(component)]


def _launches(ops: list[Op], component: str) -> int:
    """Launches of one occurrence of a component; 0 on NumPy."""
    mine = [op for op in ops if op.within(component)]
    if component != "blocks":
        mine = [op for op in mine if op.layer in (None, 0)]
    return sum(len(op.launches) for op in mine)


def kernel_table(
    ops: list[Op], timeline: Timeline, limits: Limits, tokens: int, component: str | None = None
) -> list[Row]:
    """A row per kernel and the component it runs in, longest first.

    Bytes and operations are what one call must do (:mod:`.counts`); a library's
    kernels beyond the first of a call have none. ``percent_of_limit`` compares the
    time with what a copy and a GEMM at this device's rate would take.
    ``step_us`` is what the row adds to a step: those of all rows make the step,
    although kernels may overlap.
    """
    groups: dict[tuple[str, str], list[int]] = {}
    for column, (index, _) in enumerate(timeline.owner):
        if component is None or ops[index].touches(component):
            key = timeline.names[column], ops[index].path[-1]
            groups.setdefault(key, []).append(column)
    busy, owner = timeline.busy, timeline.owner
    added = timeline.parts(tokens).added
    whole = float(sum(busy[:, columns].sum() for columns in groups.values()))
    rows = []
    for (name, where), columns in groups.items():
        total, calls = float(busy[:, columns].sum()), len(busy) * len(columns)
        row: Row = {
            "kernel": name,
            "component": where,
            "calls": calls,
            "total_ms": total / 1e3,
            "avg_us": total / calls,
            "percent": 100 * total / whole,
            "step_us": float(added[:, columns].sum(axis=1).mean()),
            "call": Timing.of(busy[:, columns].reshape(-1) / 1e6).as_dict(),
        }
        costs = [_cost(ops, owner, column) for column in columns]
        known = [cost for cost in costs if cost is not None]
        if len(known) == len(columns):
            each = Cost(*np.mean(known, axis=0).tolist())
            row |= _rates(each, total / calls / 1e6, limits)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["total_ms"])


def _cost(ops: list[Op], owner: list[tuple[int, int]], column: int) -> Cost | None:
    index, part = owner[column]
    first_of_launch = column == 0 or owner[column - 1] != owner[column]
    return ops[index].costs[part] if first_of_launch else None


def _rates(cost: Cost, seconds: float, limits: Limits) -> Row:
    memory = cost.bytes / limits.copy_bytes_per_s
    arithmetic = cost.flops / limits.product_flops_per_s
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gb_per_s": cost.bytes / seconds / 1e9,
        "gflop_per_s": cost.flops / seconds / 1e9,
        "percent_of_copy": 100 * memory / seconds,
        "percent_of_product": 100 * arithmetic / seconds,
        "percent_of_limit": 100 * max(memory, arithmetic) / seconds,
        "bound": "memory" if memory >= arithmetic else "arithmetic",
    }


def per_token(seconds: np.ndarray, batch: int, ops: list[Op], timeline: Timeline) -> Row:
    """Figures of the unprofiled steps [R, T]; the share of the blocks is of all ops' time."""
    times = seconds.reshape(-1) * 1e3
    p50, p95, p99 = np.percentile(times, [50, 95, 99]).tolist()
    busy = timeline.busy
    blocks = busy[:, _columns(ops, timeline, "blocks")].sum() / busy.sum()
    return {
        "step": Timing.of(times / 1e3).as_dict(),
        "mean_ms": float(times.mean()),
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "tokens_per_s": 1e3 * batch / float(times.mean()),
        "blocks_percent": 100 * float(blocks),
    }


def step_equation(timeline: Timeline, tokens: int, unprofiled_us: float, host_us: float) -> Row:
    """The step as kernels, what of them overlaps, and gaps, against the unprofiled step.

    ``kernels_us - overlap_us + gaps_us`` is the step as it was recorded, and
    ``recording_us`` is how much longer that is for being recorded, measured apart:
    by the clock of the unprofiled steps. Events see no gaps, for a gated step
    has none: then the gaps are the difference, and there is no residual.
    """
    parts = timeline.parts(tokens)
    kernels, alone, gaps = (
        float(each.sum(axis=1).mean()) for each in (parts.busy, parts.alone, parts.gaps)
    )
    row: Row = {"source": timeline.source, "launches": len(timeline.names), "kernels_us": kernels}
    row["overlap_us"] = kernels - alone
    if timeline.source == "events":
        row |= {"gaps_us": unprofiled_us - kernels, "recording_us": None, "residual_percent": None}
    else:
        recording = timeline.step_us - unprofiled_us
        residual = 100 * (alone + gaps - recording - unprofiled_us) / unprofiled_us
        row |= {"gaps_us": gaps, "recording_us": recording, "residual_percent": residual}
    return row | {"unprofiled_us": unprofiled_us, "host_us": host_us}


def equation_text(row: Row) -> str:
    """The equation in words, as it is printed."""
    what = "ops" if row["source"] == "perf_counter" else "kernels"
    text = f"{what} {row['kernels_us']:.1f} us"
    if row["overlap_us"] >= 0.05:
        text += f" - overlap {row['overlap_us']:.1f} us"
    text += f" + gaps {row['gaps_us']:.1f} us"
    step = f"unprofiled step {row['unprofiled_us']:.1f} us"
    if row["residual_percent"] is None:
        return f"{text} = {step}: the gaps are the difference, for events do not see them"
    total = row["kernels_us"] - row["overlap_us"] + row["gaps_us"] - row["recording_us"]
    return (
        f"{text} - recording {row['recording_us']:.1f} us = {total:.1f} us; {step}; "
        f"residual {row['residual_percent']:+.1f} %"
    )
