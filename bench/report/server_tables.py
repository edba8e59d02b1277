"""Tables of the server: its latency under load, its baseline, and what fused norms give it."""

from __future__ import annotations

from typing import Any

from .layout import Record, Row, caption, left_out, number, table

_SPREADS = ("first_token_ms", "between_events_ms", "end_to_end_ms")


def load(entry: Record, lengths: tuple[str, ...] = ("equal", "random")) -> str:
    """Closed loop, and the baseline beside it."""
    results = entry["results"]
    names = {"closed": "ours", "many": "ours, 5 ms", "baseline": "transformers"}
    parts = (row for row in results["rows"] if row["part"] in names)
    rows = [row for row in parts if row["lengths"] in lengths]
    header = ["engine", "clients", "lengths", "tokens/s", "tokens an event"]
    header += _spread_header("first token", "between events")
    lines = []
    for row in rows:
        words = [names[row["part"]], row["clients"], row["lengths"]]
        figures = [number(row["tokens_per_second"]), f"{row['tokens_per_event']:.2f}"]
        lines.append([*words, *figures, *_spreads(row, *_SPREADS[:2])])
    note = (
        f"{_model(results)}: prompts of {results['prompt']} tokens and {results['tokens']} new "
        f"ones, sampled at temperature 1, streamed{_of_random(lengths)}. Each client sends again "
        "when it is answered, for "
        f"{results['seconds']} s, from processes of their own on the same machine. An event has at "
        f"most 2 tokens (`--event-tokens 2 --workers {results['workers']}`), or all of 5 ms "
        "(`--coalesce 5 --workers 4`). transformers: generate() behind the same fronts, "
        "waiting requests in batches of up to 32. Percentiles p50 / p95 / p99"
        f"{_kept(rows, results)}{left_out(results)}"
    )
    return table(header, lines, 3) + caption(entry, note)


def summary(entry: Record) -> str:
    """The rows of equal lengths."""
    return load(entry, ("equal",))


def _of_random(lengths: tuple[str, ...]) -> str:
    """What random lengths are, where there are some."""
    said = "; random lengths are log-normal with a deviation of half the mean"
    return said * ("random" in lengths)


def _kept(rows: list[Row], results: Row) -> str:
    """How many prompt tokens were not run, as an earlier request had left them; in words."""
    worst = max(rows, key=lambda row: row["prefix_hits"] / row["requests"])
    share = worst["prefix_hits"] / (worst["requests"] * results["prompt"])
    if share < 0.005:
        return ""
    return (
        f". Prompts came again: at {worst['clients']} clients up to {share:.0%} of their tokens "
        "were still in a slot and were not run; transformers runs all"
    )


def arrivals(entry: Record) -> str:
    """Open loop."""
    results = entry["results"]
    header = ["requests/s", "answered/s", "within the limit/s", "tokens/s"]
    header += _spread_header("first token", "between events", "end to end")
    lines = []
    for row in (row for row in results["rows"] if row["part"] == "open"):
        answered = row["requests"] / results["seconds"]
        figures = [number(row["rate"]), number(answered), number(row["goodput"])]
        figures.append(number(row["tokens_per_second"]))
        lines.append([*figures, *_spreads(row, *_SPREADS)])
    limit = results["limit_ms"]
    note = (
        "The same requests with random lengths, arriving at random (Poisson) whether others are "
        f"answered or not; answered in the {results['seconds']} s. Within the limit: first token "
        f"after at most {limit['first_token']} ms, and {limit['between_events']} ms between events "
        "on average"
    )
    return table(header, lines, 0) + caption(entry, note)


def processes(entry: Record) -> str:
    """What each process's CPU does."""
    results = entry["results"]
    rows = [row for row in results["rows"] if row["part"] in ("closed", "many")]
    header = ["clients", "lengths", "engine process, %", "fronts together, %", "fronts"]
    lines = []
    for row in rows:
        fronts = [share for name, share in row["cpu"].items() if name.startswith("front")]
        shares = [number(100 * row["cpu"].get("engine", 0)), number(100 * sum(fronts))]
        clients = f"{row['clients']}, 5 ms" if row["part"] == "many" else row["clients"]
        lines.append([clients, row["lengths"], *shares, len(fronts)])
    note = "CPU time of the server's processes over the time of the load; 100 is one core"
    return table(header, lines, 2) + caption(entry, note)


def one(entry: Record) -> str:
    """One client beside the engine called directly."""
    header = ["", "first token, ms", "end to end, ms"]
    (row,) = [row for row in entry["results"]["rows"] if row["part"] == "one"]
    (ready,) = [row for row in entry["results"]["rows"] if row["part"] == "ready"]
    lines = [
        ["over HTTP", number(row["first_token_ms"]["p50"], 2), number(row["end_to_end_ms"]["p50"])],
        ["the engine called directly", number(row["direct_first_token_ms"], 2),
         number(row["direct_ms"])],
    ]  # fmt: skip
    note = (
        f"One client, medians; end to end {row['over_direct']:.2f} times the engine's own time. "
        f"The server is ready {ready['warm_s']:.1f} s after its start with warm caches, of which "
        f"the engine process takes {ready['engine']['seconds']:.1f} s for the weights and "
        f"{ready['engine']['graphs']} graphs; {ready['first_s']:.1f} s with an empty kernel cache"
    )
    return table(header, lines) + caption(entry, note)


def norms(entry: Record) -> str:
    """Row i: latency with and without the fused norm."""
    results = entry["results"]
    rows = {row["what"]: row for row in results["rows"] if row["part"] == "norms"}
    header = ["engine", "end to end, ms: p50", "p95", "p99", "tokens/s", "improvement, %"]
    pairs = (
        ("ours, unfused", "ours, fused"),
        ("PyTorch, F.rms_norm", "PyTorch, gpt2cupy.torch.rms_norm"),
    )
    lines = []
    for without, with_ in pairs:
        for what in (without, with_):
            if "end_to_end_ms" not in rows.get(what, {}):
                continue
            spread = rows[what]["end_to_end_ms"]
            better = "-"
            if what == with_ and "end_to_end_ms" in rows.get(without, {}):
                before = rows[without]["end_to_end_ms"]["p50"]
                better = f"{100 * (1 - spread['p50'] / before):.1f}"
            percentiles = [number(spread[p]) for p in ("p50", "p95", "p99")]
            lines.append([what, *percentiles, number(rows[what]["tokens_per_second"]), better])
    note = (
        f"32 clients for {results['row_seconds']} s, {_model(results)}, prompts of "
        f"{results['prompt']} tokens and {results['tokens']} new ones, streamed. Unfused: residual "
        "additions are kernels of their own, and a norm reads its rows once for each of its "
        "passes. PyTorch: a step written by hand in a CUDA graph, with RMS norms in the layer "
        "norms' places. Improvement: of the median, over the line above"
        f"{_shown_kernels(rows)}{left_out(results)}"
    )
    return table(header, lines) + caption(entry, note)


def _shown_kernels(rows: dict[str, Row]) -> str:
    """How many kernels a step of 32 rows has, with its norms fused and without."""
    counts = {
        what: sum(rows[what]["engine"].get("kernels_of_a_step", {}).values())
        for what in ("ours, fused", "ours, unfused")
        if what in rows
    }
    if len(counts) < 2 or not all(counts.values()):
        return ""
    return (
        f". A step of 32 rows is {counts['ours, fused']} kernels with them fused and "
        f"{counts['ours, unfused']} without, as recorded from its graph"
    )


def choices(entry: Record) -> str:
    """HTTP servers, messages and JSON, what the server uses first."""
    results = entry["results"]
    titles = {"HTTP": "events by HTTP", "frame": "a frame of a step", "event": "JSON of an event"}
    lines = [
        [titles[row["part"]], f"**{row['what']}**" if row["used"] else row["what"],
         number(row["per_second"]), number(row["us"], 2)]
        for row in results["rows"]
    ]  # fmt: skip
    versions = ", ".join(f"{name} {text}" for name, text in results["versions"].items())
    note = (
        "Bold is what the server uses. HTTP: one process sends the same events to "
        f"{results['streams']} clients, and does nothing else; its CPU time. Frames: the tokens "
        f"of {results['frame_rows']} streams from process to process; the receiver's CPU time. By "
        "JSON each stream is a list of three numbers, by msgspec arrays of bytes. "
        f"{versions}{left_out(results)}"
    )
    return table(["", "by", "a second", "CPU, µs each"], lines, 2) + caption(entry, note)


def front(entry: Record) -> str:
    """The ceiling of a front, behind a mock engine."""
    results = entry["results"]
    header = ["steps/s of the engine", "events/s", "between events, ms: p50 / p95 / p99",
              "CPU of the front, %"]  # fmt: skip
    lines = []
    for row in results["rows"]:
        cpu = next(share for name, share in row["cpu"].items() if name.startswith("front"))
        spread = _spreads(row, "between_events_ms")
        figures = [number(row["steps_per_second"]), number(row["events_per_second"])]
        lines.append([*figures, *spread, number(100 * cpu)])
    note = (
        f"One front process behind an engine that costs nothing and gives each of "
        f"{results['streams']} streams a token a step; a token is an event, its text included"
    )
    return table(header, lines, 0) + caption(entry, note)


def _model(results: dict[str, Any]) -> str:
    return f"{results['model']} {results['dtype']}, random weights"


def _spread_header(*names: str) -> list[str]:
    return [f"{name}, ms" for name in names]


def _spreads(row: Row, *names: str) -> list[str]:
    found = []
    for name in names:
        spread = row.get(name, {})
        found.append(" / ".join(f"{spread[p]:.2f}" for p in ("p50", "p95", "p99")) or "-"
                     if spread else "-")  # fmt: skip
    return found
