"""Pictures of the documents are those of their records; goals are told from what is reached."""

from __future__ import annotations

import copy
import json
import sys

import pytest

from gpt2cupy import record

sys.path.insert(0, str(record.ROOT / "bench"))
from bench.report import __main__ as report
from bench.report import batch_tables
from bench.report.pictures import PICTURES

RECORDS = report.records(record.RESULTS)


def timing(us):
    return {"median_us": us, "p10_us": us - 1, "p90_us": us + 1, "runs": 30}


def entry(results):
    environment = {"gpu": "NVIDIA H200", "driver": "580.1", "cuda_driver": 13000}
    return {"date": "2026-01-02", "environment": environment, "results": results}


def a_step(dtype, batch, context, us, read=50.0):
    row = {"model": "124M", "dtype": dtype, "batch": batch, "context": context}
    row |= {"decode": "graph", "step": timing(us), "tokens_per_second": 1e6 * batch / us}
    return row | ({"read": timing(read)} if read else {})


def batches(read=50.0):
    half = [(1, 128, 100), (1, 256, 120), (1, 1000, 119), (64, 256, 400), (256, 512, 2000)]
    rows = [a_step("float16", *point, read) for point in half]
    rows.append(a_step("float32", 1, 256, 166.0, read))
    return entry({"weights": "random", "decode": "auto", "at": 256, "rows": rows})


def peers():
    engines = {name: {"step": timing(us)} for name, us in PEERS.items()}
    row = {"model": "124M", "dtype": "float16", "batch": 1, "engines": engines}
    other = row | {"dtype": "float32", "engines": {"in float32": {"step": timing(1.0)}}}
    return entry({"prompt": 32, "tokens": 200, "rows": [row, other]})


def ours_alone():
    made = peers()
    for row in made["results"]["rows"]:
        row["engines"] = {"gpt2cupy graph": {"step": timing(120.0)}}
    return made


PEERS = {"gpt2cupy graph": 120.0, "near": 300.0, "far": 4000.0}


def prefill(us):
    row = {"model": "124M", "dtype": "float16", "tokens": 128}
    return entry({"rows": [row | {"device": timing(us), "first_token": timing(us + 200)}]})


@pytest.fixture(params=[False, True], ids=["ours alone", "with others"])
def found(request):
    """The records that pictures are drawn from, as benchmarks write them."""
    made = {name: RECORDS[name] for name in ("ablation", "gemv", "ops")}
    made |= {"peers": ours_alone()}
    if not request.param:
        return made | {"batches": batches(read=None)}
    return made | {"batches": batches(), "peers": peers(), "profile": RECORDS["profile"]}


@pytest.mark.parametrize("name", PICTURES)
def test_the_committed_pictures_are_those_of_the_records(name):
    picture = PICTURES[name]
    if picture.needs not in RECORDS:
        assert not (record.ROOT / "docs" / picture.file).exists(), "of a record that is gone"
        pytest.skip(f"there is no {picture.needs}.json yet")
    path = record.ROOT / "docs" / picture.file
    assert picture.is_current(path.parent, RECORDS), "python -m bench.report --draw"
    assert path.stat().st_size < 150_000


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_knows_whether_it_is_of_these_records(name, found, tmp_path):
    pytest.importorskip("matplotlib", reason="pictures are drawn by the extra bench")
    picture = PICTURES[name]
    assert not picture.is_current(tmp_path, found)
    path = picture.save(tmp_path, found)
    assert path.name == picture.file and path.read_bytes()[1:4] == b"PNG"
    assert picture.is_current(tmp_path, copy.deepcopy(found))
    other = copy.deepcopy(found)
    for row in other[picture.needs]["results"]["rows"]:
        if "engines" in row:
            row = next(iter(row["engines"].values()))
        if name == "picture-ops":
            row["ours"]["python"]["p50_us"] += 1e-9
            continue
        row["ours" if name == "picture-share" else "step"]["median_us"] += 1e-9
    assert not picture.is_current(tmp_path, other)


def test_what_is_too_slow_for_the_picture_stands_in_its_note():
    found = {"batches": batches(), "peers": peers()}
    points = PICTURES["picture-latency"].points(found)
    assert {one["name"]: one["context"] for one in points["peers"]} == {"near": 132, "far": 132}
    block = PICTURES["picture-latency"].block(found)
    assert "beyond the picture: far 4,000 µs" in block and "near" not in block
    assert "(decode-latency.png)" in block
    alone = PICTURES["picture-latency"].block({"batches": batches()})
    assert "eers" not in alone


def test_a_step_without_a_record_of_its_batch_is_in_no_series():
    points = PICTURES["picture-throughput"].points({"batches": batches()})
    assert [row[:2] for row in points["rows"]] == [[1, 256], [64, 256], [256, 512]]
    series = PICTURES["picture-latency"].points({"batches": batches()})["series"]
    assert {dtype: [row[0] for row in rows] for dtype, rows in series.items()} == {
        "float16": [128, 256, 1000],
        "float32": [256],
    }


def test_goals_are_told_from_what_is_reached():
    found = {"batches": batches(), "prefill": prefill(450.0)}
    lines = batch_tables.goals(found).splitlines()
    for said in (
        "| 124M float16, batch 1, context 256, a token, µs | 130 | 100 | 120 | yes |",
        "| 124M float16, context 1000 over 128 | 1.25 | 1.15 | 1.19 | yes |",
        "| 124M float32, batch 1, context 256, a token, µs | 165 | 130 | 166 | no |",
        "| 124M float16, batch 64, context 256, a step, µs | 420 | 340 | 400 | yes |",
        "| 124M float16, batch 256, context 512, over the memory roofline | 1.40 | 1.20 | 40.00 | "
        "no |",
        "| 124M float16, batch 4, context 256, a step, µs | 160 | 120 | - | - |",
        "| 355M float16, batch 1, over the memory roofline | 1.40 | 1.20 | - | - |",
        "| 124M float16, prompt of 128, ms | 0.40 | 0.25 | 0.45 | no |",
        "| 124M float16, prompt of 512, ms | 0.60 | 0.40 | - | - |",
        "| first token of a prompt of 128, in Python, ms | 0.70 | 0.40 | 0.65 | yes |",
    ):
        assert said in lines
    assert "Medians; - where no record has the figure yet. Over the memory roofline" in lines[-1]


def test_goals_explain_a_dash_only_where_there_is_one(monkeypatch):
    monkeypatch.setattr(batch_tables, "GOALS", batch_tables.GOALS[:1])
    made = batch_tables.goals({"batches": batches()})
    assert "| - |" not in made and "Medians. Over the memory roofline" in made


@pytest.mark.parametrize("name", ["decode-sizes", "decode-int8", "prefill", "startup"])
def test_goals_find_their_rows_in_the_records(name):
    """Rows are found by their values: one that is named otherwise would never be."""
    says = {"decode-sizes": "M float16, batch 1, over", "decode-int8": "M int8, batch 1, over"}
    says |= {"prefill": "prompt", "startup": "generate"}
    wanted = [goal for goal in batch_tables.GOALS if says[name] in goal[0]]
    assert wanted and all(goal[-1](RECORDS) > 0 for goal in wanted)


def test_tables_of_steps_by_batch_and_by_context():
    made = batch_tables.batches(batches())
    assert "| float16 | 64 | 256 | graph | 400 (399 to 401) | 50 | 8.00 | 160,000 |" in made
    assert "| 1 | 1000 |" not in made and "float32" not in made
    made = batch_tables.contexts(batches(read=None))
    assert "| float16 | 1 | 1000 | graph | 119 (118 to 120) | - | - | 8,403 |" in made
    assert "| float32 | 1 | 256 |" in made and "| 64 |" not in made


def test_check_fails_for_a_picture_that_is_not_drawn(tmp_path, capsys):
    (tmp_path / "docs").mkdir()
    (tmp_path / "results").mkdir()
    names = "picture-ladder", "picture-latency"
    page = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names)
    (tmp_path / "docs" / "decode.md").write_text(page)
    (tmp_path / "results" / "ablation.json").write_text(json.dumps(RECORDS["ablation"]))
    assert report.update_pictures(tmp_path, tmp_path / "results", draw=False) == 1
    said = capsys.readouterr()
    assert said.out == "docs/decode-ladder.png: differs from its records, draw it by --draw\n"
    assert said.err == "docs/decode-latency.png: not drawn, no batches.json\n"
    pytest.importorskip("matplotlib", reason="pictures are drawn by the extra bench")
    assert report.update_pictures(tmp_path, tmp_path / "results", draw=True) == 0
    assert report.update_pictures(tmp_path, tmp_path / "results", draw=False) == 0
