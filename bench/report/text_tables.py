"""Tables of whole texts: many at once, and the same model on two GPUs."""

from __future__ import annotations

from .layout import Record, caption, number, table


def generate(entry: Record) -> str:
    """Lists through `generate`, in wall-clock time."""
    results = entry["results"]
    header = ["texts at once", "tokens/s", "time of the call, ms", "GPU busy, ms", "wall / busy"]
    lines = []
    for row in results["rows"]:
        busy = row.get("busy_seconds")
        shares = ["-", "-"]
        if busy:
            shares = [number(busy * 1e3), f"{row['wall_over_busy']:.2f}"]
        seconds = row["wall"]["median_us"] / 1e3
        lines.append(
            [str(row["texts"]), number(row["tokens_per_second"]), number(seconds), *shares]
        )
    first = results["rows"][0]
    note = (
        f"`LanguageModel.generate`, {results['model']} {results['dtype']}, {results['weights']} "
        f"weights: prompts of {first['prompt']} tokens, {first['tokens'] // first['texts']} new "
        "ones each, as many texts at once as prompts; from the call to the completions, text "
        "included, in wall-clock time, medians. GPU busy: between events around what the "
        "same requests queue, in a run of their own"
    )
    return table(header, lines) + caption(entry, note)


def devices(entry: Record) -> str:
    """Two models on two GPUs: alone and at once."""
    results = entry["results"]
    header = ["run", "cuda:0, tokens/s", "cuda:1, tokens/s", "share of alone"]
    lines = []
    for name in ("alone", "two threads", "two processes"):
        found = results[name]
        shares = ", ".join(f"{share:.3f}" for share in found.get("over_alone", ()))
        lines.append([name, *map(number, found["tokens_per_second"]), shares or "-"])
    same = [batch for batch, equal in results["same_bits"].items() if equal]
    differ = [batch for batch, equal in results["same_bits"].items() if not equal]
    bits = f"Texts and log-probabilities of both have the same bits for {', '.join(same)} at once"
    if differ:
        bits += f", others for {', '.join(differ)}"
    note = f"One text after another, {results['model']}. {bits}"
    return table(header, lines, text=1) + caption(entry, note)
