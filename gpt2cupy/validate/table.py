"""The result of a validation as tables for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table

from .compare import Comparison, Step, worst

EDGE = 3  # steps shown from the beginning and from the end


def render(comparisons: Sequence[Comparison]) -> RenderableType:
    """One table of all comparisons, then the steps of those that say most."""
    return Group(_summary(comparisons), *(_steps(c) for c in _worth_showing(comparisons)))


def verdict(comparisons: Sequence[Comparison]) -> str:
    """The last line: PASS or FAIL, and in which comparison the error rule is broken first."""
    failed = [c for c in comparisons if not c.passed]
    if not failed:
        return f"PASS: {len(comparisons)} comparisons within the error rule"
    first = failed[0]
    return (
        f"FAIL: {len(failed)} of {len(comparisons)} comparisons break the error rule, first "
        f"{first.ours} against {first.against} in {first.dtype}: max abs {first.max_abs:.3g}, "
        f"admitted {first.limit.max:.3g}; RMSE {first.rmse:.3g}, admitted {first.limit.rms:.3g}"
    )


def _worth_showing(comparisons: Sequence[Comparison]) -> Iterator[Comparison]:
    """The cached step against the whole forward or another model; and the first that fails."""
    failed = next((c for c in comparisons if not c.passed and c.steps), None)
    for comparison in comparisons:
        usual = comparison.ours == "eager" and comparison.against in ("full", "hf float64")
        if usual or comparison is failed:
            yield comparison


def _summary(comparisons: Sequence[Comparison]) -> Table:
    table = Table(title="Errors and what the error rule admits")
    for name in ("dtype", "ours", "against"):
        table.add_column(name)
    for name in ("max abs", "admitted", "RMSE", "admitted", "max KL", "argmax agrees"):
        table.add_column(name, justify="right")
    table.add_column("")
    for c in comparisons:
        agreed = sum(step.agrees for step in c.steps)
        table.add_row(
            *(c.dtype, c.ours, c.against),
            *(f"{value:.2e}" for value in (c.max_abs, c.limit.max, c.rmse, c.limit.rms)),
            f"{max(step.kl for step in c.steps):.1e}" if c.steps else "",
            f"{agreed}/{len(c.steps)}" if c.steps else "",
            "pass" if c.passed else "FAIL",
        )
    return table


def _steps(comparison: Comparison) -> Table:
    """The first and last steps and the worst; of each step, the row that differs most."""
    by_step: dict[int, list[Step]] = {}
    for step in comparison.steps:
        by_step.setdefault(step.step, []).append(step)
    shown = [worst(rows) for number, rows in by_step.items() if _at_edge(number, len(by_step))]
    largest = worst(comparison.steps)
    if largest not in shown:
        shown = sorted([*shown, largest], key=lambda step: step.step)
    table = Table(
        title=f"{comparison.dtype}: {comparison.ours} against {comparison.against}, "
        f"{len(by_step)} steps, * the worst"
    )
    for name in ("step", "row", "max abs", "RMSE", "KL"):
        table.add_column(name, justify="right")
    for name in (f"top of {comparison.ours}", f"top of {comparison.against}", "argmax"):
        table.add_column(name)
    for step in shown:
        table.add_row(
            f"{step.step}{'*' if step is largest else ''}",
            str(step.row),
            *(f"{value:.2e}" for value in (step.max_abs, step.rmse, step.kl)),
            _top(step.top),
            _top(step.reference_top),
            "same" if step.agrees else "differs",
        )
    return table


def _at_edge(number: int, count: int) -> bool:
    return number < EDGE or number >= count - EDGE


def _top(tokens: tuple[tuple[int, float], ...]) -> str:
    return " ".join(f"{token}:{logit:.4g}" for token, logit in tokens)
