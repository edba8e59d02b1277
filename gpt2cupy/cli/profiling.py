"""What ``gpt2cupy profile`` does: check the files, measure, print, write."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.table import Table

from .. import lm, output
from ..errors import Gpt2CupyError, InputError
from ..profile import Profile, Settings, component, equation_text, plot, profile, trace
from .console import Console

_KERNEL_WIDTH = 44


def run(
    model: str,
    dtype: str,
    device: str,
    settings: Settings,
    *,
    only: str | None = None,
    trace_path: Path | None = None,
    plot_path: Path | None = None,
    as_json: bool = False,
    cupti: bool = True,
    **source: Any,
) -> None:
    """Profile a model and print the tables; all that can be wrong is found before measuring.

    ``source`` has the options of :func:`gpt2cupy.load` that say what is loaded.

    Raises
    ------
    Gpt2CupyError
        Also after everything is printed and written that can be: if CUPTI could not be used,
        or stdout or a file takes no more.
    """
    chosen = None if only is None else component(only)
    for flag, path in (("--trace", trace_path), ("--plot", plot_path)):
        if path is not None:
            output.check_writable(path, flag)
    if trace_path and plot_path and trace_path.resolve() == plot_path.resolve():
        raise InputError(
            f"the trace and the plot cannot both be {plot_path}",
            where="--plot",
            remedy="Name two files.",
        )
    if plot_path is not None:
        plot.check_kind(plot_path)
    with lm.load(model, dtype=dtype, device=device, **source) as loaded:
        where = {"model": loaded.name, "device": loaded.device}
        where |= {name: value for name, value in source.items() if value is not None}
        found = profile(
            loaded.model, loaded.encode(settings.prompt), settings, component=chosen, cupti=cupti
        )
    found.results = where | found.results
    _hand_over(found, trace_path, plot_path, as_json)


def _hand_over(
    found: Profile, trace_path: Path | None, plot_path: Path | None, as_json: bool
) -> None:
    """Print and write; what fails is raised only when the rest is done, so that it is kept."""

    def tell() -> None:
        if as_json:
            output.write(json.dumps(found.results, indent=1) + "\n")
        else:
            show(found.results)

    def write_trace() -> None:
        if trace_path is not None:
            trace.write(found, trace_path)
            print(f"trace: {trace_path} (open it in https://ui.perfetto.dev)", file=sys.stderr)

    def draw_plot() -> None:
        if plot_path is not None:
            plot.draw(found.results, plot_path)
            print(f"plot: {plot_path}", file=sys.stderr)

    failed: list[Exception] = [] if found.error is None else [found.error]
    for step in (tell, write_trace, draw_plot):
        try:
            step()
        except (Gpt2CupyError, BrokenPipeError) as error:
            failed.append(error)
    for other in failed[1:]:  # one can be raised
        print(f"gpt2cupy: {other}", file=sys.stderr)
    if failed:
        raise failed[0]


def show(results: dict[str, Any]) -> None:
    """Print a profile for people."""
    console = Console()
    run = results["settings"]
    in_int8 = " with matrices in int8" if results.get("quantize") else ""
    console.print(
        f"{results['model']}, {results['dtype']}{in_int8} on {results['device']}, "
        f"{results['decoder']} "
        f"decoder\nprompt {run['prompt']!r} ({run['prompt_tokens']} tokens), batch {run['batch']}, "
        f"{run['warmup']} warm-up runs, {run['runs']} runs of {run['tokens']} tokens",
        markup=False,
    )
    for name, rows in results["tables"].items():
        _component_table(console, name, rows, results["component_timer"])
    _kernel_table(console, results)
    _summary(console, results)


def _table(title: str, *headers: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for header in headers:
        is_text = header in ("kernel", "component", "covers")
        # A library's kernel may have a name of hundreds of characters.
        width = _KERNEL_WIDTH if header == "kernel" else None
        table.add_column(
            header, justify="left" if is_text else "right", no_wrap=True, max_width=width
        )
    return table


def _component_table(console: Console, name: str, rows: list[dict[str, Any]], timer: str) -> None:
    table = _table(f"\n{name} ({timer})", "component", "avg ms", "total ms", "count", "%", "covers")
    for row in rows:
        covers = row["covers"]
        if covers and row["launches"]:
            covers += f": {row['launches']} launch{'es' if row['launches'] > 1 else ', fused'}"
        table.add_row(
            row["component"],
            f"{row['avg_ms']:.4f}",
            f"{row['total_ms']:.2f}",
            str(row["count"]),
            f"{row['percent']:.1f}",
            covers,
        )
    console.print(table)


def _kernel_table(console: Console, results: dict[str, Any]) -> None:
    only = results["kernel_component"]
    title = f"\nkernels{f' of {only}' if only else ''} ({results['kernel_timer']})"
    table = _table(
        title, "kernel", "component", "calls", "total ms", "avg us", "%", "step us", "kB", "kFLOP",
        "GB/s", "GFLOP/s", "% of copy", "% of product",
    )  # fmt: skip
    for row in results["kernels"]:
        figures = ["", "", "", "", "", ""]
        if "bytes" in row:
            figures = [
                f"{row['bytes'] / 1e3:,.1f}", f"{row['flops'] / 1e3:,.1f}",
                f"{row['gb_per_s']:,.1f}", f"{row['gflop_per_s']:,.1f}",
                f"{row['percent_of_copy']:.1f}", f"{row['percent_of_product']:.2f}",
            ]  # fmt: skip
        table.add_row(
            row["kernel"], row["component"], str(row["calls"]), f"{row['total_ms']:.2f}",
            f"{row['avg_us']:.2f}", f"{row['percent']:.1f}", f"{row['step_us']:.2f}", *figures,
        )  # fmt: skip
    console.print(table)


def _summary(console: Console, results: dict[str, Any]) -> None:
    limits, token, cost = results["limits"], results["per_token"], results["overhead"]
    slower = [f"timing ops {cost['ops_percent']:+.1f} %"]
    if "kernels_percent" in cost:
        slower.append(f"recording kernels {cost['kernels_percent']:+.1f} %")
    lines = [
        "",
        f"limits      copy {limits['copy_bytes_per_s'] / 1e9:,.0f} GB/s "
        f"({limits['copy_bytes'] >> 20} MiB), product {limits['product_flops_per_s'] / 1e9:,.0f} "
        f"GFLOP/s ({limits['product_size']} cubed, {results['dtype']})",
        f"per token   mean {token['mean_ms']:.4f} ms, p50 {token['p50_ms']:.4f}, "
        f"p95 {token['p95_ms']:.4f}, p99 {token['p99_ms']:.4f}; "
        f"{token['tokens_per_s']:,.1f} tokens/s; blocks {token['blocks_percent']:.1f} %",
        f"step        {equation_text(results['gaps'])}",
        "            (step us: from the end of the kernel before to its own; together the step)",
        f"host        {results['gaps']['host_us']:.1f} us to queue a step",
        f"profiling   a step takes longer by: {', '.join(slower)}",
    ]
    if results["note"]:
        lines.append(f"note        {results['note']}")
    console.print("\n".join(lines), markup=False)
