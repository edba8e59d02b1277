"""The pictures of docs/decode.md: for each the points it shows, how they are drawn, its note."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from . import op_tables, peer_tables
from .picture import COLOURS, Found, Picture, Points

MARKERS = "os^Dv<>"
DTYPES = ("float16", "bfloat16", "float32")
ENGINES = ("ours", "cublas")  # of a GEMV, as gemv.json names them


def at_batch(results: dict[str, Any], batch: int) -> dict[str, list[dict[str, Any]]]:
    """Rows of a batch by dtype, the shortest context first."""
    rows = sorted(results["rows"], key=lambda row: row["context"])
    named = ((d, [r for r in rows if r["dtype"] == d and r["batch"] == batch]) for d in DTYPES)
    return {dtype: of for dtype, of in named if of}


def read_us(row: dict[str, Any]) -> float | None:
    return row["read"]["median_us"] if "read" in row else None


def peer_points(found: Found, model: str) -> list[dict[str, Any]]:
    """Peers' steps in float16: name, batch, and the middle of the context they ran over."""
    results = found["peers"]["results"] if "peers" in found else {"rows": []}
    return [
        {"name": name, "batch": row["batch"], "us": one["step"]["median_us"]}
        | {"context": results["prompt"] + results["tokens"] // 2}
        for row in results["rows"]
        for name, one in row["engines"].items()
        if (row["model"], row["dtype"]) == (model, "float16") and "gpt2cupy" not in name
    ]


def peers_note(points: Points) -> str:
    said = ". Other engines: the mean time of a token over a whole text, in float16"
    return said * bool(points["peers"])


def draw_peers(axes: Any, peers: list[dict[str, Any]], place: Callable[[Any], tuple]) -> None:
    for number, peer in enumerate(peers):
        marker, colour = MARKERS[(3 + number) % 7], COLOURS[(3 + number) % 7]
        axes.plot(*place(peer), marker, color=colour, ms=8, mfc="none", mew=1.8, label=peer["name"])


def decode_paths(rows: Iterable[Any]) -> str:
    """Those that the steps took."""
    return " or ".join(dict.fromkeys(row["decode"] for row in rows))


def latency_points(found: Found) -> Points:
    results = found["batches"]["results"]
    series = {
        dtype: [[row["context"], row["step"]["median_us"], read_us(row)] for row in rows]
        for dtype, rows in at_batch(results, 1).items()
    }
    model = results["rows"][0]["model"]
    peers = [peer for peer in peer_points(found, model) if peer["batch"] == 1]
    paths = decode_paths(row for rows in at_batch(results, 1).values() for row in rows)
    return {"model": model, "decode": paths, "series": series, "peers": peers}


def draw_latency(figure: Any, points: Points) -> None:
    axes = figure.subplots()
    for number, (dtype, rows) in enumerate(points["series"].items()):
        contexts, steps, reads = zip(*rows, strict=True)
        look = {"color": COLOURS[number], "ms": 5}
        axes.plot(contexts, steps, f"-{MARKERS[number]}", label=f"gpt2cupy, {dtype}", **look)
        if None not in reads:
            label = f"memory roofline, {dtype}"
            axes.plot(contexts, reads, f":{MARKERS[number]}", mfc="none", label=label, **look)
    ours = [row[1] for rows in points["series"].values() for row in rows]
    # A peer many times as slow would press our lines together: the caption has it.
    near = [peer for peer in points["peers"] if peer["us"] <= 3 * max(ours)]
    draw_peers(axes, near, lambda peer: (peer["context"], peer["us"]))
    axes.set(xlabel="context, tokens", ylabel="time of a step, µs", xlim=(0, None))
    axes.margins(y=0.08)
    axes.set_ylim(0)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)


def latency_note(points: Points) -> str:
    note = (
        f"GPT-2 {points['model']} with random weights, batch 1, decode path {points['decode']}; "
        f"medians. Dotted: the memory roofline, a kernel that only reads the weights and the cache "
        f"so far, in the same run"
    )
    ours = [row[1] for rows in points["series"].values() for row in rows]
    far = [peer for peer in points["peers"] if peer["us"] > 3 * max(ours)]
    note += peers_note(points)
    if far:
        each = ", ".join(f"{peer['name']} {peer['us']:,.0f} µs" for peer in far)
        note += f"; beyond the picture: {each}"
    return note


def throughput_points(found: Found) -> Points:
    results = found["batches"]["results"]
    rows = sorted(results["rows"], key=lambda row: row["batch"])
    dtype, at, model = rows[-1]["dtype"], results["at"], rows[0]["model"]
    rows = [
        row for row in rows if row["dtype"] == dtype and (row["context"] == at or row["batch"] > 1)
    ]
    figures = [
        [row["batch"], row["context"], row["step"]["median_us"], read_us(row)] for row in rows
    ]
    settings = {"model": model, "dtype": dtype, "at": at, "decode": decode_paths(rows)}
    return settings | {"rows": figures, "peers": peer_points(found, model)}


def draw_throughput(figure: Any, points: Points) -> None:
    axes = figure.subplots()
    contexts = list(dict.fromkeys(row[1] for row in points["rows"]))
    for number, context in enumerate(contexts):
        rows = [row for row in points["rows"] if row[1] == context]
        batches = [row[0] for row in rows]
        look = {"color": COLOURS[number], "ms": 6}
        line, marker = ("-" if len(rows) > 1 else ""), MARKERS[number]
        rates = [1e6 * row[0] / row[2] for row in rows]
        axes.plot(batches, rates, line + marker, label=f"gpt2cupy, context {context}", **look)
        if all(row[3] for row in rows):
            rates = [1e6 * row[0] / row[3] for row in rows]
            label, line = f"memory roofline, context {context}", line and ":"
            axes.plot(batches, rates, line + marker, mfc="none", label=label, **look)
    draw_peers(
        axes, points["peers"], lambda peer: (peer["batch"], 1e6 * peer["batch"] / peer["us"])
    )
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="tokens/s")
    ticks = sorted({row[0] for row in points["rows"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)


def throughput_note(points: Points) -> str:
    return (
        f"GPT-2 {points['model']} with random weights, {points['dtype']}, decode path "
        f"{points['decode']}; medians of steps, both axes logarithmic. Dotted: the memory "
        f"roofline, a kernel that only reads the weights and the cache{peers_note(points)}"
    )


def ladder_points(found: Found) -> Points:
    """Steps of one dtype by batch: all on, each optimisation off, all off."""
    results = found["ablation"]["results"]
    dtypes = {row["dtype"] for row in results["rows"]}
    dtype = next(name for name in DTYPES if name in dtypes)
    rows: dict[str, list[Any]] = {}
    for row in results["rows"]:
        if row["dtype"] == dtype:
            # What is the graph's is off without the persistent step, which replaces it.
            name = f"without {row['off'].removeprefix('persistent,')}" if row["off"] else "all on"
            name = "only the KV cache" if row["only_cache"] and row["off"] else name
            rows.setdefault(str(row["batch"]), []).append([name, row["step"]["median_us"]])
    settings = {key: results[key] for key in ("model", "prompt", "tokens")}
    return settings | {"dtype": dtype, "batches": rows}


def draw_ladder(figure: Any, points: Points) -> None:
    batches = points["batches"]
    names = list(dict.fromkeys(name for rows in batches.values() for name, _ in rows))
    # The slowest on top, as a ladder is climbed; the last is all off where batches differ.
    names.sort(key=lambda name: (name == "all on", name != "only the KV cache"))
    for number, (batch, axes) in enumerate(
        zip(batches, figure.subplots(1, len(batches), sharey=True, squeeze=False)[0], strict=True)
    ):
        steps = dict(batches[batch])
        there = [name for name in names if name in steps]
        places = [len(names) - 1 - names.index(name) for name in there]
        bars = axes.barh(places, [steps[name] for name in there], color=COLOURS[number])
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
        axes.set_yticks(range(len(names)), names[::-1], fontsize=8)
        axes.set(xlabel="time of a step, µs", title=f"batch {batch}")
        axes.margins(x=0.22)
        axes.set_xlim(0)


def ladder_note(points: Points) -> str:
    return (
        f"Each optimisation taken away alone, and all of them; the longer the bar, the more it "
        f"gives. GPT-2 {points['model']} with random weights, {points['dtype']}, "
        f"{points['tokens']} greedy tokens after {points['prompt']}; medians"
    )


def share_points(found: Found) -> Points:
    """GEMVs beside the memory roofline, and kernels of a step beside the copy rate."""
    results = found["gemv"]["results"]
    first = results["rows"][0]
    kind = {key: first[key] for key in ("model", "dtype")}
    products = [
        [row["shape"], *(row["read"]["median_us"] / row[one]["median_us"] for one in ENGINES)]
        for row in results["rows"]
        if {key: row[key] for key in kind} == kind
    ]
    own = found["profile"]["results"]["ours"] if "profile" in found else []
    kernels = [
        [f"{row['component']} ({row['kernel']})", row["percent_of_copy"] / 100]
        for each in own
        if each["dtype"] == first["dtype"]
        for row in each["kernels"]
        if "percent_of_copy" in row
    ]
    return kind | {"products": products, "kernels": kernels}


def draw_share(figure: Any, points: Points) -> None:
    panels = figure.subplots(1, 1 + bool(points["kernels"]), squeeze=False)[0]
    axes, products = panels[0], points["products"][::-1]
    for number, name in enumerate(("gpt2cupy", "cuBLAS")):
        places = [place + 0.2 - 0.4 * number for place in range(len(products))]
        bars = axes.barh(places, [row[1 + number] for row in products], 0.38, label=name)
        for bar in bars:
            bar.set(color=COLOURS[number], hatch="//" * number, edgecolor="white")
        axes.bar_label(bars, fmt="{:.0%}", padding=2, fontsize=8)
    axes.set_yticks(range(len(products)), [row[0] for row in products], fontsize=8)
    axes.set(title="GEMV", xlabel="share of the memory roofline")
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    for axes in panels[1:]:
        kernels = points["kernels"][::-1]
        bars = axes.barh([row[0] for row in kernels], [row[1] for row in kernels])
        for bar in bars:
            bar.set_color(COLOURS[0])
        axes.bar_label(bars, fmt="{:.1%}", padding=2, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.set(title="kernels of a step", xlabel="share of the copy rate")
    for axes in panels:
        axes.set_xlim(0, 1.2)
        axes.axvline(1, color="black", lw=0.8, zorder=0)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")


def share_note(points: Points) -> str:
    note = (
        f"GPT-2 {points['model']}, {points['dtype']}, one row. Left: each GEMV in a captured "
        f"graph beside a kernel that only reads as many bytes"
    )
    if points["kernels"]:
        note += (
            ". Right: bytes of each kernel of an eager step over its time, beside the rate of a "
            "large copy; what moves few bytes cannot come near it, for it ends first"
        )
    return note


PICTURES = {
    "picture-engines": Picture(
        "engines.png", "Tokens per second beside other engines", "peers", peer_tables.USE,
        peer_tables.picture_points, peer_tables.picture_draw, peer_tables.picture_note,
    ),
    "picture-latency": Picture(
        "decode-latency.png", "Latency against context", "batches", ("peers",),
        latency_points, draw_latency, latency_note,
    ),
    "picture-throughput": Picture(
        "decode-throughput.png", "Throughput against batch", "batches", ("peers",),
        throughput_points, draw_throughput, throughput_note,
    ),
    "picture-ladder": Picture(
        "decode-ladder.png", "What each optimisation gives", "ablation", (),
        ladder_points, draw_ladder, ladder_note,
    ),
    "picture-share": Picture(
        "decode-share.png", "Share of the limit by kernel", "gemv", ("profile",),
        share_points, draw_share, share_note,
    ),
    "picture-ops": Picture(
        "ops.png", "Ops beside PyTorch's", "ops", (),
        op_tables.picture_points, op_tables.picture_draw, op_tables.picture_note,
    ),
}  # fmt: skip
