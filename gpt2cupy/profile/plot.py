"""A picture: every kernel under the roofline of this device, and a bar per component."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import Gpt2CupyError, InputError
from ..output import file_errors


def matplotlib_figure() -> Any:
    """Matplotlib's Figure class, or an error that says what to install."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Gpt2CupyError(
            "matplotlib is not installed", where="--plot", remedy="Install gpt2cupy[bench]."
        ) from error
    return Figure


def check_kind(path: Path) -> None:
    """Raise InputError unless a picture of this name's kind can be drawn."""
    kinds = matplotlib_figure()().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise InputError(
            f"{path.name} names no kind of picture",
            where="--plot",
            remedy="End it in .png or .svg.",
        )


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw ``results`` of a profile into an image whose kind the file's name says.

    Raises
    ------
    Gpt2CupyError
        If the file takes no more.
    """
    figure = matplotlib_figure()(figsize=(14, 7), layout="constrained")
    roofline, bars = figure.subplots(1, 2)
    _roofline(roofline, results)
    _bars(bars, results)
    run = results["settings"]
    figure.suptitle(
        f"{results.get('model', 'model')}, {results['dtype']}, batch {run['batch']}, "
        f"{run['tokens']} tokens after {run['prompt_tokens']}, {results.get('device', '')}"
    )
    with file_errors(path, "the plot"):
        figure.savefig(path, dpi=120)


def _roofline(axes: Any, results: dict[str, Any]) -> None:
    copy = results["limits"]["copy_bytes_per_s"] / 1e9
    product = results["limits"]["product_flops_per_s"] / 1e9
    rows = [row for row in results["kernels"] if row.get("flops")]
    intensities = [row["flops"] / row["bytes"] for row in rows] + [product / copy]
    x = np.geomspace(min(intensities) / 3, max(intensities) * 3, 50)
    axes.plot(x, np.minimum(x * copy, product), color="black", lw=1)
    for number, row in enumerate(rows):
        label = f"{row['kernel']}: {row['component']}"
        size = 20 + 4 * row["percent"]
        place = row["flops"] / row["bytes"], row["gflop_per_s"]
        axes.scatter(*place, size, label=label, color=f"C{number}", marker="osD^"[number // 10 % 4])
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="GFLOP/s")
    axes.set_title(f"roofline: copy {copy:,.0f} GB/s, product {product:,.0f} GFLOP/s", fontsize=10)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.12), ncols=2)


def _bars(axes: Any, results: dict[str, Any]) -> None:
    tables = results["tables"]
    rows = [
        *(row for row in tables["model"] if row["component"] != "blocks"),
        *(row for row in tables["block"] if row["component"] in ("ln_1", "ln_2")),
        *tables["attention"],
        *tables["mlp"],
    ]
    steps = tables["model"][0]["count"]
    names = [row["component"] for row in rows][::-1]
    axes.barh(names, [1e3 * row["total_ms"] / steps for row in rows][::-1])
    axes.set(xlabel="us per token, all layers", title="components")
