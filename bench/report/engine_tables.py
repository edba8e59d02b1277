"""Tables of the engine: shared beginnings, speculation, and waits while prompts arrive."""

from __future__ import annotations

from .layout import Record, Row, caption, number, spread, table


def prefixes(entry: Record) -> str:
    """Time to all first tokens with and without a shared beginning."""
    results = entry["results"]
    row = results["rows"][0]
    names = {
        "apart": "prompts that share nothing",
        "shared": "prompts that begin alike",
        "kept": "the same, the beginning left by an earlier run (`prefix_cache=True`)",
    }
    lines = []
    for key, name in names.items():
        ratio = row.get(f"{key}_over_apart")
        lines.append([name, spread(row[key], 1e3, 2), "-" if ratio is None else f"{ratio:.2f}"])
    header = ["prompts", "all first tokens, ms (p10 to p90)", "of the first row"]
    note = (
        f"{results['texts']} prompts at once, {results['shared']} tokens shared or not and "
        f"{results['own']} of their own; {results['model']} {results['dtype']}, "
        f"{results['weights']} weights. Wall-clock time, medians of "
        f"{row['apart']['runs']}; texts with a first token go on meanwhile"
    )
    return table(header, lines) + caption(entry, note)


def speculation(entry: Record) -> str:
    """Texts that repeat themselves and texts that do not, with and without."""
    results = entry["results"]
    kinds = {
        "repeats": "repeats itself",
        "one token": "one token",
        "new": "no draft is accepted",
    }
    lines = []
    for row in results["rows"]:
        rates = [number(1e6 * row["tokens"] / row[how]["median_us"]) for how in ("without", "with")]
        drafts = f"{row['accepted']} of {row['drafted']}"
        names = row["model"], kinds[row["kind"]]
        same = "yes" if row["same_tokens"] else "**no**"
        lines.append([*names, *rates, f"{row['speed_up']:.2f}", drafts, same])
    header = [
        "size",
        "text",
        "without, tokens/s",
        "with, tokens/s",
        "speed-up",
        "accepted drafts",
        "same text",
    ]
    first = results["rows"][0]
    biased = any(row["kind"] == "one token" for row in results["rows"])
    note = (
        f"One text of {first['tokens']} tokens after {results['prompt']}, {results['dtype']}, "
        f"{results['weights']} weights; the one that repeats itself is greedy, and of five the "
        "one of which most drafts are accepted; "
        f"{'that of one token has a logit bias; ' * biased}the last is sampled by a "
        "seed of which none is accepted. Wall-clock time, with and without in turn, "
        f"medians{_differences(results)}"
    )
    return table(header, lines, 2) + caption(entry, note)


def _differences(results: Row) -> str:
    """Where texts began to differ, in words."""
    found = [
        f"{row['model']}: the texts part at token {one['place'] + 1}, where the two logits are "
        f"{abs(one['gap']):.4f} apart; neighbouring {results['dtype']} numbers of that size are "
        f"{one['ulp']:.4f} apart"
        for row in results["rows"]
        if (one := row.get("difference"))
    ]
    return ". " + ". ".join(found) if found else ""


def arrivals(entry: Record) -> str:
    """Gaps between two tokens of running texts."""
    results = entry["results"]
    lines = []
    for row in results["rows"]:
        shares = [number(row[f"p{share}_us"] / 1e3, 2) for share in (50, 99, 99.9)]
        first = row.get("first_token_us")
        lines.append(
            [number(row["rate"]), *shares, number(row["max_us"] / 1e3, 2)]
            + [number(first[name] / 1e3, 1) if first else "-" for name in ("p50", "p99")]
        )
    header = ["prompts a second", "gap p50, ms", "p99", "p99.9", "max"]
    header += ["first token p50, ms", "p99"]
    note = (
        f"{results['texts']} texts run while requests of 1 to {results['longest']} prompt tokens "
        f"and 8 new ones arrive at random; {results['model']} {results['dtype']}, "
        f"{results['weights']} weights, {number(results['seconds'])} s each. A gap is the time "
        "between two tokens of a running text as `Engine.step` returns them, a first token that "
        "of a request that arrives, in wall-clock time"
    )
    return table(header, lines) + caption(entry, note)
