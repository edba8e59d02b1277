"""Tables of long lists: files of requests, and pairs that are scored."""

from __future__ import annotations

from .layout import Record, caption, number, table


def batch(entry: Record) -> str:
    """A file of requests, in wall-clock time."""
    results = entry["results"]
    header = [
        "requests",
        "tokens/s",
        "time of the call, s",
        "the host alone, s",
        "host, µs a token",
    ]
    lines = []
    for row in results["rows"]:
        wall, host = (row[name]["median_us"] for name in ("wall", "host"))
        figures = [number(row["tokens_per_second"]), f"{wall / 1e6:.2f}", f"{host / 1e6:.2f}"]
        lines.append([row["name"], *figures, f"{host / row['tokens']:.2f}"])
    first = results["rows"][0]
    note = (
        f"`LanguageModel.batch`, {results['model']} {results['dtype']}, {results['weights']} "
        f"weights: {first['requests']:,} requests of "
        f"{first['prompt_tokens'] / first['requests']:.0f} tokens on average, "
        f"{first['tokens'] / first['requests']:.0f} new ones each, {first['max_batch']} at once; "
        "from the call to its return, files read and written, in wall-clock time, medians. "
        "Stop and logprobs: a stop string is looked for in every text, and the 5 most probable "
        "tokens are written with each. The host alone: the same call with an engine whose steps "
        "cost nothing"
    )
    return table(header, lines) + caption(entry, note)


def scoring(entry: Record) -> str:
    """Pairs of context and continuation, in wall-clock time."""
    results = entry["results"]
    header = ["pairs in a call", "pairs/s", "tokens/s", "encoding alone, µs a pair"]
    (row,) = results["rows"]
    encoding = row["encoding"]["median_us"] / row["pairs"]
    together = [number(row["pairs_per_second"]), number(row["tokens_per_second"])]
    alone = [number(row["alone_per_second"]), "-", "-"]
    lines = [[number(row["pairs"]), *together, f"{encoding:.1f}"], ["1", *alone]]
    note = (
        f"`LanguageModel.score`, {results['model']} {results['dtype']}, {results['weights']} "
        f"weights: pairs of texts of {results['context']} and {results['continuation']} tokens, "
        "from the call to the list of scores, in wall-clock time, medians"
    )
    return table(header, lines) + caption(entry, note)
