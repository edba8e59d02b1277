"""Tables made from profile.json: the baseline's operators, components, tokens, kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gpt2cupy.profile.components import TABLES

from .layout import Record, Row, caption, kernel, number, table

OPERATORS = 20  # rows of the operator table that are shown
LOST = 8  # rows of the table of losses, per dtype
# The components whose kernels are listed, in the order of the step.
KERNELS = (*TABLES["attention"], *TABLES["mlp"], "lm_head")


def engines(results: Row) -> Iterator[tuple[str, Row]]:
    """(name, results) of Hugging Face first, then ours in each dtype."""
    for peer in results["peers"]:
        yield f"transformers, {peer['settings']['dtype']}", peer
    for own in results["ours"]:
        yield f"gpt2cupy, {own['dtype']}", own


def with_paths(results: Row) -> Iterator[tuple[str, Row]]:
    """The same, and ours by the other decode paths."""
    yield from engines(results)
    for own in results.get("paths", []):
        yield f"gpt2cupy, {own['dtype']}, {own['decoder']}", own


def settings(results: Row) -> str:
    run = results["ours"][0]["settings"]
    return (
        f"Shape of {results['model']}, {results['weights']} weights; prompt {run['prompt']!r} "
        f"({run['prompt_tokens']} tokens), batch {run['batch']}, {run['warmup']} warm-up runs, "
        f"{run['runs']} runs of {run['tokens']} tokens"
    )


def operators(entry: Record) -> str:
    """What PyTorch runs for Hugging Face's generate()."""
    results = entry["results"]
    if not results["peers"]:
        return "Hugging Face was not measured in this record.\n"
    found = results["peers"][0]["operators"]
    keys = (
        "self_cpu_percent", "self_cpu_ms", "cpu_total_percent", "cpu_total_ms", "cpu_avg_us",
        "self_cuda_ms", "self_cuda_percent", "cuda_total_ms", "cuda_avg_us",
    )  # fmt: skip
    rows = by_kernel(found["rows"])
    shown = rows[:OPERATORS]
    lines = []
    for row in shown:
        figures = ["-" if row[key] is None else number(row[key], 2) for key in keys]
        lines.append([f"`{row['name']}`", *figures, row["calls"]])
    header = [
        *("name", "self CPU %", "self CPU, ms", "CPU total %", "CPU total, ms", "CPU avg, µs"),
        *("self CUDA, ms", "self CUDA %", "CUDA total, ms", "CUDA avg, µs", "calls"),
    ]
    note = (
        f"torch.profiler over generate() of {found['new_tokens']} new tokens at batch 1, "
        f"{next(engines(results))[0]}; the first {len(shown)} of {len(rows)} operators and "
        f"kernels, those of one name added up. Self CPU {found['self_cpu_total_ms']:.1f} ms in all"
    )
    if found["self_cuda_total_ms"] is not None:
        note += (
            f", self CUDA {found['self_cuda_total_ms']:.1f} ms; matrix products are "
            f"{found['matrix_percent']:.1f} % of the GPU's time, which idles "
            f"{found['idle_percent']:.1f} % of {found['wall_ms']:.0f} ms"
        )
    return table(header, lines) + caption(entry, note)


def by_kernel(rows: list[Row]) -> list[Row]:
    """Operators and kernels by the name that the table shows, the longest on the GPU first.

    Kernels that differ only in template arguments are one row.
    """
    merged: dict[str, Row] = {}
    for row in rows:
        name = kernel(row["name"])
        if name not in merged:
            merged[name] = row | {"name": name}
            continue
        into = merged[name]
        for key in into.keys() - {"name"}:
            into[key] = None if into[key] is None or row[key] is None else into[key] + row[key]
        into["cpu_avg_us"] = 1e3 * into["cpu_total_ms"] / into["calls"]
        if into["cuda_total_ms"] is not None:
            into["cuda_avg_us"] = 1e3 * into["cuda_total_ms"] / into["calls"]
    return sorted(
        merged.values(), key=lambda row: (-(row["self_cuda_ms"] or 0.0), -row["self_cpu_ms"])
    )


def components(name: str) -> Callable[[Record], str]:
    """One of the four component tables, ours under the baseline's."""

    def make(entry: Record) -> str:
        results = entry["results"]
        lines = []
        for engine, found in engines(results):
            for row in found["tables"][name]:
                covers = row.get("covers")
                title = f"{row['component']} ({covers})" if covers else row["component"]
                times = [number(row["avg_ms"], 4), number(row["total_ms"], 1), row["count"]]
                lines.append([engine, title, *times, number(row["percent"], 1)])
        header = ["engine", "component", "avg, ms", "total, ms", "count", "%"]
        note = f"{settings(results)}. In brackets: what one launch of ours does"
        return table(header, lines, 2) + caption(entry, note)

    return make


def tokens(entry: Record) -> str:
    """Time of a token, by engine and decode path."""
    results = entry["results"]
    keys = ("mean_ms", "p50_ms", "p95_ms", "p99_ms")
    lines = []
    for engine, found in with_paths(results):
        token = found["per_token"]
        figures = [number(token[key], 3) for key in keys]
        figures += [number(token["blocks_percent"], 1), number(token["tokens_per_s"], 1)]
        lines.append([engine, *figures])
    header = ["engine", "ms a token", "p50", "p95", "p99", "blocks, %", "tokens/s"]
    return table(header, lines) + caption(entry, settings(results))


def kernels(entry: Record) -> str:
    """Kernels of the components in KERNELS, with their share of the limit."""
    results = entry["results"]
    lines = []
    for own in results["ours"]:
        rows = [row for row in own["kernels"] if row["component"] in KERNELS]
        for row in sorted(rows, key=lambda row: KERNELS.index(row["component"])):
            figures = [row["calls"], number(row["avg_us"], 2), number(row["total_ms"], 2)]
            if "gb_per_s" in row:
                figures += [number(row["gb_per_s"]), number(row["percent_of_limit"], 1)]
            else:
                figures += ["-", "-"]
            lines.append([own["dtype"], row["component"], f"`{kernel(row['kernel'])}`", *figures])
    header = [
        *("dtype", "component", "kernel", "calls", "avg, µs", "total, ms", "GB/s", "% of limit"),
    ]
    own = results["ours"][0]
    note = (
        f"{settings(results)}; times from {own['kernel_timer']}. Limit: what a copy and a GEMM "
        f"of this dtype reach in the same run"
    )
    return table(header, lines, 3) + caption(entry, note)


def gaps(entry: Record) -> str:
    """A step as kernels and gaps, and what profiling costs."""
    results = entry["results"]
    lines = []
    for engine, own in with_paths(results):
        if "gaps" not in own:
            continue
        step, cost = own["gaps"], own["overhead"]
        keys = (
            "kernels_us", "overlap_us", "gaps_us", "recording_us", "unprofiled_us", "host_us",
        )  # fmt: skip
        figures = [step["launches"]]
        # A record from before overlap was told apart has it in the gaps, which are negative there.
        figures += ["-" if step.get(key) is None else number(step[key], 1) for key in keys]
        shares = [step["residual_percent"]]
        shares += [cost.get(key) for key in ("ops_percent", "kernels_percent")]
        figures += ["-" if each is None else f"{each:+.1f}" for each in shares]
        lines.append([engine, *figures])
    header = [
        *("engine", "launches", "kernels, µs", "overlap, µs", "gaps, µs", "recording, µs"),
        *("unprofiled step, µs", "host, µs"),
        *("residual, %", "timing ops costs, %", "recording kernels costs, %"),
    ]
    note = (
        f"{settings(results)}. Kernels - overlap + gaps is the step as it was recorded; recording: "
        f"how much longer it is for that; residual: what is left, against the unprofiled step"
    )
    return table(header, lines) + caption(entry, note)


def added(entry: Record) -> str:
    """A step of the other decode paths, kernel by kernel: what each adds to it."""
    results = entry["results"]
    lines = []
    for own in results.get("paths", []):
        rows = [row for row in own["kernels"] if "step_us" in row]
        whole = sum(row["step_us"] for row in rows)
        for row in sorted(rows, key=lambda row: -row["step_us"]):
            name = [own["dtype"], own["decoder"], row["component"], f"`{kernel(row['kernel'])}`"]
            steps = own["settings"]["runs"] * own["settings"]["tokens"]
            ran = 1e3 * row["total_ms"] / steps
            share = f"{row['step_us'] / whole:.1%}"
            lines.append([*name, number(row["step_us"], 1), share, number(ran, 1)])
        if rows:
            lines.append([own["dtype"], own["decoder"], "all", "", number(whole, 1), "100.0%", ""])
    if not lines:
        return "This record does not have them; `python bench/profiling.py` on a GPU does.\n"
    header = ["dtype", "decode", "component", "kernel", "adds to a step, µs", "of it", "ran, µs"]
    note = (
        f"{settings(results)}. Adds: from the end of the kernel before to its own end; a kernel "
        f"that starts early and waits ran longer than it adds. Recorded: see the table of gaps"
    )
    return table(header, lines, 4) + caption(entry, note)


def lost(entry: Record) -> str:
    """Where a token's time is lost: what each kernel takes beyond the limit, and the gaps."""
    results = entry["results"]
    lines = []
    for own in results["ours"]:
        run = own["settings"]
        steps = run["runs"] * run["tokens"]
        # What recording costs is no loss of an unprofiled step.
        idle = own["gaps"]["gaps_us"] - (own["gaps"].get("recording_us") or 0)
        found = [("gaps between kernels", idle, idle, None)]
        for row in own["kernels"]:
            taken, share = 1e3 * row["total_ms"] / steps, row.get("percent_of_limit")
            beyond = taken * max(0.0, 1 - (share or 0) / 100)
            found.append((f"`{kernel(row['kernel'])}`: {row['component']}", taken, beyond, share))
        found.sort(key=lambda each: -each[2])
        for name, taken, beyond, share in found[:LOST]:
            shown = "-" if share is None else number(share, 1)
            lines.append([own["dtype"], name, number(taken, 1), shown, number(beyond, 1)])
    header = ["dtype", "what", "µs a token", "% of limit", "µs beyond the limit"]
    note = f"{settings(results)}; the {LOST} largest losses of each dtype"
    return table(header, lines, 2) + caption(entry, note)


def pictures(entry: Record) -> str:
    """The pictures that bench/profiling.py draws from the record."""
    results = entry["results"]
    dtypes = [own["dtype"] for own in results["ours"]]
    drawn = "".join(f"![Roofline and components, {d}](profiling-{d}.png)\n" for d in dtypes)
    return drawn + caption(entry, settings(results))
