"""Tables made from validate.json."""

from __future__ import annotations

from .layout import Record, caption, table

# How validate calls what it compares -> how a table does.
WAYS = {"full": "whole forward"} | {
    path: f"cached, {path}" for path in ("eager", "graph", "persistent")
}


def comparisons(entry: Record) -> str:
    """Every comparison: each way against its reference."""
    results = entry["results"]
    lines = []
    for row in results["comparisons"]:
        figures = [f"{row[key]:.2e}" for key in ("max_abs", "rmse")]
        figures += [f"{row['limit'][key]:.2e}" for key in ("max", "rms")]
        figures += [f"{row['largest_kl']:.1e}", f"{row['agreeing']} of {row['compared']}"]
        passed = "yes" if row["passed"] else "no"
        ways = [WAYS.get(row[key], row[key]) for key in ("ours", "against")]
        lines.append([row["dtype"], *ways, *figures, passed])
    header = [
        *("dtype", "ours", "against", "max abs", "RMSE", "limit", "limit of RMSE"),
        *("largest KL", "same token", "passed"),
    ]
    note = (
        f"`{results['model']}`, {results['steps']} steps of {results['batch']} rows, all fed the "
        f"same random tokens; differences of the logits. The limit is that of the error rule: "
        f"twice the error of a plain computation in this dtype, plus one unit in the last place; "
        f"between two of ours, the limits of both"
    )
    return table(header, lines, 3) + caption(entry, note)


def steps(entry: Record) -> str:
    """Some steps: the cache against whole forward passes."""
    results = entry["results"]
    lines = []
    for row in results["comparisons"]:
        if row["against"] == "full":
            for step in row["steps"]:
                figures = [f"{step[key]:.2e}" for key in ("max_abs", "rmse")]
                tops = [top_tokens(step[key]) for key in ("top", "reference_top")]
                lines.append(
                    [
                        row["dtype"],
                        WAYS.get(row["ours"], row["ours"]),
                        step["step"],
                        *figures,
                        *tops,
                    ]
                )
    header = [
        *("dtype", "decode", "step", "max abs", "RMSE", "cached: token:logit"),
        "whole forward: token:logit",
    ]
    note = f"`{results['model']}`; the first row of {results['batch']}"
    return table(header, lines, 2) + caption(entry, note)


def top_tokens(top: list[tuple[int, float]]) -> str:
    return " ".join(f"{token}:{logit:.3f}" for token, logit in top)
