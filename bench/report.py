"""Tables of the documents, made from the records in bench/results.

    python bench/report.py               rewrite the tables of README.md and docs/*.md
    python bench/report.py --check       exit 1 if a document differs from its records
    python bench/report.py --records     one line per record: current or stale
    python bench/report.py --records --strict    and exit 1 if one is stale

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is written
there by hand is lost. A table without a record is left as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gpt2cupy import record

ROOT = record.ROOT
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

_VERSIONS = (
    "driver", "CUDA", "nvrtc", "cupy-cuda12x", "cupy-cuda13x", "numpy", "torch", "transformers",
)  # fmt: skip

Record = dict[str, Any]


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    names = [*header]
    lines = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def source_line(entry: Record, what: str) -> str:
    """What was measured, where and when, as it stands under a table."""
    return f"\n{what}. {device(entry)}; {versions(entry)}; {entry['date']}.\n"


def device(entry: Record) -> str:
    return entry["environment"].get("gpu") or entry["environment"]["cpu"]


def versions(entry: Record) -> str:
    """The versions that a figure may depend on, as far as the record has them."""
    found = dict(entry["environment"])
    if number := found.get("cuda_driver"):
        found["CUDA"] = f"{number // 1000}.{number % 1000 // 10}"
    return ", ".join(f"{name} {found[name]}" for name in _VERSIONS if name in found)


def decode(entry: Record) -> str:
    results = entry["results"]
    contexts = [step["context"] for step in results["rows"][0]["steps"]]
    steps = [f"step at {context}, µs" for context in contexts]
    header = ["dtype", "batch", "one-row product", *steps, "host, µs", "in a text, µs", "tokens/s"]
    rows = []
    for row in results["rows"]:
        times = {step["context"]: step["step"]["median_us"] for step in row["steps"]}
        host = max(step["host"]["median_us"] for step in row["steps"])
        whole = row["end_to_end"]["us_per_step"]
        product = row["gemv"] if row["batch"] == 1 else "-"
        figures = [*(times[context] for context in contexts), host, whole]
        figures.append(1e6 * row["batch"] / whole)
        rows.append([row["dtype"], row["batch"], product, *map("{:,.0f}".format, figures)])
    text = results["rows"][0]["end_to_end"]
    note = (
        f"`{results['model']}` with {results['weights']} weights, {results['decoder']} decoder, "
        f"medians. A step feeds one token per row and chooses the next; its time is between events "
        f"on the device. Host: what Python takes to queue a step. In a text: a step of "
        f"{text['tokens']} tokens after {text['prompt']}, each token read by the host"
    )
    return table(header, rows) + source_line(entry, note)


def startup(entry: Record) -> str:
    results = entry["results"]
    warm = results["warm"]
    median, low, high = (warm[key] / 1e6 for key in ("median_us", "p10_us", "p90_us"))
    spread = f"{median:.2f} ({low:.2f} to {high:.2f})"
    rows = [[results["model"], results["device"], f"{results['first_s']:.2f}", spread]]
    header = ["model", "device", "first run, s", "warm, s (p10 to p90)"]
    note = f"From starting a process to its first token; warm is the median of {warm['runs']}"
    return table(header, rows) + source_line(entry, note)


def gpu_tests(entry: Record) -> str:
    results = entry["results"]
    counts = [results["passed"], len(results["failed"]), len(results["skipped"])]
    header = ["GPU tests", "passed", "failed", "skipped"]
    return table(header, [[device(entry), *counts]]) + source_line(entry, "`make gpu-test`")


def cpu(entry: Record) -> str:
    results = entry["results"]
    rows = [
        [name, f"{row['prefill_ms']:.0f}", f"{row['tokens_per_second']:.1f}"]
        for name, row in results["engines"].items()
    ]
    note = (
        f"{results['model']}, {results['dtype']}, batch {results['batch']}, {results['threads']} "
        f"threads, {results['new_tokens']} tokens after {results['prompt_tokens']}; medians of "
        f"{results['rounds']} rounds in turn. gpt2cupy makes {results['ratio_to_best']:.2f} times "
        f"the tokens/s of {results['best_of_transformers']}"
    )
    header = ["engine", "prompt, ms", "tokens/s"]
    return table(header, rows) + source_line(entry, note)


# A table is made from the record of the same name.
TABLES: dict[str, Callable[[Record], str]] = {
    "decode": decode,
    "startup": startup,
    "cpu": cpu,
    "gpu-tests": gpu_tests,
}


def records(folder: Path) -> dict[str, Record]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def documents(root: Path) -> list[Path]:
    return [path for path in (root / "README.md", *sorted(root.glob("docs/*.md"))) if path.exists()]


def updated(text: str, found: dict[str, Record], where: str) -> tuple[str, list[str]]:
    """The document with its tables made anew, and what could not be made."""
    missing = []

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            sys.exit(f"{where}: there is no table {name!r}; tables: {', '.join(TABLES)}")
        if name not in found:
            missing.append(f"{where}: table {name} is left as it is, no {name}.json")
            return match[0]
        return f"{begin}{TABLES[name](found[name])}{end}"

    return _MARKED.sub(fill, text), missing


def update(root: Path, results: Path, *, check: bool) -> int:
    """Rewrite the documents, or only compare; returns how many differ."""
    found, differing = records(results), 0
    for path in documents(root):
        text = path.read_text(encoding="utf-8")
        new, missing = updated(text, found, path.relative_to(root).as_posix())
        print(*missing, sep="\n", end="\n" if missing else "", file=sys.stderr)
        if new != text:
            differing += 1
            print(
                f"{path.relative_to(root)}: {'differs from its records' if check else 'rewritten'}"
            )
            if not check:
                path.write_text(new, encoding="utf-8")
    return differing


def list_records(results: Path) -> int:
    """Print a line per record; returns how many are stale."""
    stale = 0
    for name, entry in records(results).items():
        word = "current" if record.is_current(entry) else "stale"
        stale += word == "stale"
        print(f"{name:<16} {word:<8} {device(entry)}, {entry['date']}")
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", action="store_true", help="list the records")
    parser.add_argument(
        "--strict", action="store_true", help="with --records: fail if one is stale"
    )
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the documents")
    parser.add_argument(
        "--results", type=Path, default=record.RESULTS, help="folder of the records"
    )
    args = parser.parse_args()
    if args.records:
        failed = list_records(args.results) and args.strict
    else:
        failed = update(args.root, args.results, check=args.check) and args.check
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
