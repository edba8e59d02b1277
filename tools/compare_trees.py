"""Benchmarks of two checkouts in turn on one device: what a change cost or gained.

    python tools/compare_trees.py OLD [NEW] [--rounds 2] [--bench batches,prefill]

OLD and NEW (this checkout by default) are folders with bench/ and gpt2cupy/ in them, such as
`git worktree add /tmp/old v0.1` makes. Every benchmark runs in OLD, then NEW, then again, in
processes of their own, and of each row the fastest median of a side counts: what else the machine
does can only add. Both caches of kernels are filled by the first round.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What runs, and where the medians of a row lie.
BENCHES = {
    "batches": (
        ["--dtype", "float16", "--context", "128", "--batch", "1,4,16,64", "--runs", "20"],
        ("step",),
    ),
    "prefill": ([], ("device", "first_token")),
}
NAMES = ("model", "dtype", "batch", "context", "tokens")


def run(tree: Path, name: str, out: Path) -> dict[str, float]:
    """Median of every row in us, by what the row is."""
    options, places = BENCHES[name]
    script = [sys.executable, f"bench/{name}.py", *options, "--out", str(out)]
    # What came to this process by PYTHONPATH stays importable, behind the tree's own package.
    paths = [str(tree), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "GPT2CUPY_CACHE_DIR": str(out.parent / f"kernels-{tree.resolve().name}"),
    }
    done = subprocess.run(script, cwd=tree, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{tree}: {name} ended with {done.returncode}\n{done.stderr[-2000:]}")
    rows: list[dict[str, Any]] = json.loads(out.read_text())["results"]["rows"]
    return {
        " ".join(f"{key} {row[key]}" for key in NAMES if key in row) + f", {place}": row[place][
            "median_us"
        ]
        for row in rows
        for place in places
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=Path(__file__).parents[1])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--bench", default=",".join(BENCHES))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in args.bench.split(","):
            best: dict[Path, dict[str, float]] = {args.old: {}, args.new: {}}
            for _ in range(args.rounds):
                for tree, found in best.items():
                    for row, us in run(tree, name, Path(folder) / f"{name}.json").items():
                        found[row] = min(us, found.get(row, us))
            for row, old in best[args.old].items():
                new = best[args.new][row]
                print(f"{row}: {old:.1f} -> {new:.1f} us, {new / old:.3f}", flush=True)


if __name__ == "__main__":
    main()
