"""Tables and pictures of the documents, made from the records in bench/results.

    python -m bench.report               rewrite the tables of README.md and docs/*.md
    python -m bench.report --draw        and draw the pictures again (extra bench: matplotlib)
    python -m bench.report --check       exit 1 if a document or a picture differs from its records
    python -m bench.report --records     one line per record: current, stale (by what) or missing
    python -m bench.report --records --strict    and exit 1 unless all are current
    python -m bench.report --compare A.json B.json    what changed beyond the noise

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; what is written
there by hand is lost. A table without a record is left as it is. The table `environment`
names the device and the versions that all other tables of the page were measured with.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from gpt2cupy import record
from gpt2cupy.errors import InputError

from ..arguments import main
from . import peer_tables
from .batch_tables import GOALS_USE, goals
from .compare import compared
from .layout import Record, device, environment, read
from .pictures import PICTURES
from .tables import TABLES

ROOT = record.ROOT
# Name of a table of several records -> (the one it cannot do without, how).
JOINED: dict[str, tuple[str, Callable[[dict[str, Record]], str]]] = {
    name: (each.needs, each.block) for name, each in PICTURES.items()
} | {
    "goals": ("batches", goals),
    "peers": ("peers", peer_tables.peers),
    "peers-summary": ("peers", peer_tables.summary),
}
USES = {name: each.uses for name, each in PICTURES.items()} | {
    "goals": GOALS_USE,
    "peers": peer_tables.USE,
    "peers-summary": peer_tables.USE,
}
SOURCES = {name: source for name, (source, _) in (TABLES | JOINED).items()}
ENVIRONMENT = "environment"  # the table that every page with another one has
_IMAGE = re.compile(r"(!\[[^\]]*\]\()([\w.-]+\))")
_MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def records(folder: Path) -> dict[str, Record]:
    """The records of a folder by name."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}", where="--results", remedy="Name that of the records."
        )
    return {path.stem: read(path) for path in sorted(folder.glob("*.json"))}


def kind(entry: Record) -> str:
    """The script that made a record."""
    return next((Path(w).name for w in entry["command"].split() if w.endswith(".py")), "?")


def comparison(paths: list[Path]) -> list[str]:
    """The lines of --compare."""
    before, after = map(read, paths)
    made = [kind(entry) for entry in (before, after)]
    if made[0] != made[1]:
        raise InputError(
            f"the records are of different kinds, by {made[0]} and by {made[1]}",
            where="--compare",
            remedy="Name two records of the same benchmark.",
        )
    try:
        return list(compared(before, after))
    except (LookupError, TypeError, AttributeError) as error:
        raise InputError(
            f"that is no record of a benchmark: {error!r}",
            where="--compare",
            remedy="Take it from git again, or measure it again.",
        ) from error


def documents(root: Path) -> list[Path]:
    """README.md and the pages under docs/."""
    found = (root / "README.md", *sorted(root.glob("docs/*.md")), *sorted(root.glob("docs/*/*.md")))
    return [path for path in found if path.exists()]


def measured(text: str, found: dict[str, Record]) -> dict[str, Record]:
    """The records that a document's tables and pictures are made from."""
    names = []
    for _, name, _ in _MARKED.findall(text):
        names += [SOURCES[name]] if name in SOURCES else []
        names += USES.get(name, ())
    return {name: found[name] for name in dict.fromkeys(names) if name in found}


def updated(text: str, found: dict[str, Record], where: str) -> tuple[str, list[str]]:
    """The document with its tables made again, and what could not be made."""
    missing = []
    # Pictures lie in docs/.
    folder = {"README.md": "docs/"}.get(where, "../" * (where.count("/") - 1))

    def fill(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name == ENVIRONMENT:
            return f"{begin}{environment(measured(text, found))}{end}"
        if name not in SOURCES:
            known = ", ".join((ENVIRONMENT, *SOURCES))
            sys.exit(f"{where}: there is no table {name!r}; tables: {known}")
        if (source := SOURCES[name]) not in found:
            missing.append(f"{where}: table {name} is left as it is, no {source}.json")
            return match[0]
        made = JOINED[name][1](found) if name in JOINED else TABLES[name][1](found[source])
        return begin + _IMAGE.sub(rf"\1{folder}\2", made) + end

    new = _MARKED.sub(fill, text)
    if measured(text, found) and f"<!-- table: {ENVIRONMENT} -->" not in text:
        missing.append(f"{where}: no table {ENVIRONMENT} says where its figures come from")
    return new, missing


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


def marked(root: Path) -> list[tuple[str, str]]:
    """The tables and pictures of the documents, each with the document it stands in."""
    texts = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in documents(root)
    }
    return [(name, where) for where, text in texts.items() for _, name, _ in _MARKED.findall(text)]


def update_pictures(root: Path, results: Path, *, draw: bool) -> int:
    """Draw the pictures, or only say which are not those of their records; returns how many."""
    found, differing = records(results), 0
    for picture in (PICTURES[name] for name, _ in marked(root) if name in PICTURES):
        where = f"docs/{picture.file}"
        if picture.needs not in found:
            print(f"{where}: not drawn, no {picture.needs}.json", file=sys.stderr)
        elif draw:
            picture.save(root / "docs", found)
            print(f"{where}: drawn")
        elif not picture.is_current(root / "docs", found):
            differing += 1
            print(f"{where}: differs from its records, draw it by --draw")
    return differing


def promised(root: Path) -> dict[str, list[str]]:
    """The records that the documents' tables are made from, each with its tables."""
    found: dict[str, list[str]] = {}
    for name, where in marked(root):
        if name in SOURCES:
            found.setdefault(SOURCES[name], []).append(f"{where}: {name}")
    return found


def list_records(root: Path, results: Path) -> int:
    """Print a line per record, there or promised; returns how many are not current."""
    there, wanted, bad = records(results), promised(root), 0
    for name in sorted(there.keys() | wanted.keys()):
        if name not in there:
            word, about = "missing", ", ".join(wanted[name])
        else:
            entry = there[name]
            word = "current" if record.is_current(entry) else "stale"
            word = word if record.is_complete(entry) else "cut off"
            about = f"{device(entry)}, {entry['date']}"
            if differs := record.changes(entry):
                about += f": {', '.join(differs)}"
        bad += word != "current"
        print(f"{name:<16} {word:<8} {about}")
    return bad


def run() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", action="store_true", help="list the records")
    parser.add_argument(
        "--strict", action="store_true", help="with --records: fail unless all are current"
    )
    parser.add_argument("--draw", action="store_true", help="draw the pictures too")
    parser.add_argument("--check", action="store_true", help="compare, change nothing")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="two records")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the documents")
    parser.add_argument(
        "--results", type=Path, default=record.RESULTS, help="folder of the records"
    )
    args = parser.parse_args()
    if args.compare:
        print(*comparison(args.compare), sep="\n")
        return
    if args.records:
        failed = list_records(args.root, args.results) and args.strict
    else:
        differing = update(args.root, args.results, check=args.check)
        draw = args.draw and not args.check
        differing += update_pictures(args.root, args.results, draw=draw)
        failed = differing and args.check
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(run)
