"""What `python -m bench.report --compare` finds between two records."""

from __future__ import annotations

import json
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from gpt2cupy import record

sys.path.insert(0, str(record.ROOT / "bench"))
from bench.report.compare import compared, timings


def timing(median, width=5.0):
    return {"median_us": median, "p10_us": median - width, "p90_us": median + width, "runs": 5}


def entry(results):
    made = {"command": "python bench/decode.py", "date": "2026-01-02", "files": {}}
    return made | {"environment": {"gpu": "NVIDIA H200", "driver": "580.1"}, "results": results}


def decode_record(**medians):
    rows = [
        {"model": size, "dtype": "float16", "steps": [{"context": 128, "step": timing(us)}]}
        for size, us in medians.items()
    ]
    return entry({"rows": rows})


def test_a_change_within_the_noise_is_none():
    lines = list(compared(decode_record(a=100.0), decode_record(a=108.0)))
    assert lines == ["0 of 1 timings changed beyond the noise"]


@given(st.floats(10, 1e4), st.floats(10, 1e4), st.floats(0, 50), st.floats(0, 50))
def test_what_changed_is_what_does_not_overlap(old, new, old_width, new_width):
    a, b = entry({"step": timing(old, old_width)}), entry({"step": timing(new, new_width)})
    *changes, last = compared(a, b)
    slower = new - new_width > old + old_width
    faster = new + new_width < old - old_width
    assert [line.split()[0] for line in changes] == ["slower"] * slower + ["faster"] * faster
    assert last.startswith(f"{int(slower or faster)} of 1 ")


def test_compare_names_rows_and_finds_them_in_any_order(tmp_path):
    before, after = (
        decode_record(a=100.0, b=50.0, gone=1.0),
        decode_record(b=25.0, new=2.0, a=100.0),
    )
    after["environment"]["driver"] = "590.0"
    for name, entry_ in (("a", before), ("b", after)):
        (tmp_path / f"{name}.json").write_text(json.dumps(entry_))
    command = [sys.executable, "-m", "bench.report", "--compare"]
    command += [tmp_path / "a.json", tmp_path / "b.json"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
    assert shown.returncode == 0
    assert shown.stdout.splitlines() == [
        "driver: 580.1 -> 590.0",
        "faster -50.0%: rows / model b dtype float16 / steps / context 128 / step: "
        "50.0 us (45.0 to 55.0) -> 25.0 us (20.0 to 30.0)",
        "only in the first: rows / model gone dtype float16 / steps / context 128 / step",
        "only in the second: rows / model new dtype float16 / steps / context 128 / step",
        "1 of 2 timings changed beyond the noise",
    ]


def test_every_row_of_a_record_has_a_name_of_its_own():
    """Two rows of one name would hide each other when compared."""
    for path in sorted(record.RESULTS.glob("*.json")):
        found = [name for name, _ in timings(json.loads(path.read_text())["results"])]
        assert len(found) == len(set(found)), path.name


def test_records_without_timings_say_so():
    assert list(compared(entry({"a": 1}), entry({"a": 2}))) == [
        "neither record holds a timing with its spread"
    ]


def test_records_that_share_no_row_say_so():
    *rows, last = compared(decode_record(small=100.0), decode_record(large=200.0))
    assert last == "the records have no timing in common: nothing was compared"
    assert [row.split(":")[0] for row in rows] == ["only in the first", "only in the second"]


def test_what_is_no_record_is_one_line(tmp_path):
    files = ("good.json", "list.json", "broken.json", "another.json")
    good, list_, broken, another = (tmp_path / name for name in files)
    prefill = decode_record(a=1.0) | {"command": "python bench/prefill.py --runs 3"}
    another.write_text(json.dumps(prefill))
    good.write_text(json.dumps(decode_record(a=1.0)))
    list_.write_text("[]")
    broken.write_text("{")
    for other, says in (
        (tmp_path / "none.json", "none.json cannot be read: No such file"),
        (list_, "list.json is no record of a benchmark: it has no command"),
        (broken, "broken.json is no record of a benchmark: Expecting"),
        (another, "of different kinds, by decode.py and by prefill.py (--compare)"),
    ):
        command = [sys.executable, "-m", "bench.report", "--compare", good, other]
        failed = subprocess.run(command, capture_output=True, text=True, cwd=record.ROOT)
        assert failed.returncode == 1 and failed.stderr.startswith("report: ")
        assert says in failed.stderr and failed.stderr.count("\n") == 1


def test_profiles_are_compared_by_token_and_by_kernel():
    def profile(us):
        kernel = {"kernel": "gemv", "component": "lm_head", "call": timing(us)}
        own = {"dtype": "float16", "decoder": "graph", "kernels": [kernel]}
        return entry({"paths": [own | {"per_token": {"step": timing(100.0)}}]})

    slower, last = compared(profile(20.0), profile(40.0))
    name = "paths / dtype float16 decoder graph / kernels / component lm_head kernel gemv / call"
    assert slower.startswith(f"slower +100.0%: {name}: ")
    assert last == "1 of 2 timings changed beyond the noise"
